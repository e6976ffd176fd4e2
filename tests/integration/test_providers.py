"""Which provider ONNX Runtime runs on. The builds are pretended; their fall back to the CPU is real."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from compress.cli import main as cli
from compress.core.errors import UserError
from compress.core.place import Place
from compress.runtime import llamacpp_server, providers
from compress.runtime.block_chain import BlockChain, CachedText
from compress.runtime.bundle import read_bundle
from compress.runtime.onnx_engine import OnnxEngine
from compress.runtime.providers import Provider, choose_device
from compress.runtime.session import Session, choose_engine, depth_artifacts

IDS = [(37 * i) % 440 + 3 for i in range(12)]
CUDA = Place(device="cuda")


def folder_of(bundle: Path) -> Path:
    return bundle / depth_artifacts(read_bundle(bundle), "onnx", "fp32")[4].path


@pytest.fixture
def claimed(monkeypatch):
    """ONNX Runtime claims to have CUDA; it will not start, and the CPU is taken in its place."""
    names = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)


@pytest.fixture
def idle(monkeypatch):
    """The device cuda is a provider that this build has, and that has no kernel of any operation here."""
    known = providers.PROVIDERS | {"cuda": Provider("AzureExecutionProvider", "onnxruntime-gpu")}
    monkeypatch.setattr(providers, "PROVIDERS", known)


def test_a_provider_that_the_build_lacks_names_its_package(bundle):
    with pytest.raises(UserError, match=r"has no CUDAExecutionProvider: install onnxruntime-gpu in place of onnxrunt"):
        Session(bundle, place=CUDA)
    with pytest.raises(UserError, match="no WebGpuExecutionProvider: install onnxruntime-webgpu"):
        OnnxEngine(folder_of(bundle), place=Place(device="webgpu"))


def test_the_fall_back_to_the_cpu_is_an_error(bundle, claimed):
    with pytest.raises(
        UserError, match=r"CUDAExecutionProvider did not start for .*model.onnx, and ONNX Runtime would"
    ):
        Session(bundle, place=CUDA)
    with pytest.raises(UserError, match="CUDAExecutionProvider did not start"):
        OnnxEngine(folder_of(bundle), place=CUDA)


def test_products_left_to_the_cpu_are_an_error(bundle, idle):
    with pytest.raises(
        UserError, match=r"has no GroupQueryAttention and no MatMul for the type of .*model.onnx, and wo"
    ):
        Session(bundle, place=CUDA)


@pytest.mark.parametrize("build", ["claimed", "idle"])
def test_auto_then_takes_the_cpu_and_says_why(bundle, build, request):
    request.getfixturevalue(build)
    why = {"claimed": "did not start", "idle": "has no GroupQueryAttention"}[build]
    with Session(bundle, "onnx", threads=1) as session:
        assert session.device.startswith("cpu, because --device cuda: ") and why in session.device
        tried = session.generate("the way", max_tokens=4).text
    with Session(bundle, "onnx", threads=1, place=Place(device="cpu")) as session:
        assert session.device == "cpu" and session.generate("the way", max_tokens=4).text == tried


def test_auto_takes_the_first_that_there_is(monkeypatch):
    for available, taken in (
        (["CoreMLExecutionProvider", "CPUExecutionProvider"], "cpu"),
        (["WebGpuExecutionProvider", "CPUExecutionProvider"], "webgpu"),
        (["WebGpuExecutionProvider", "DmlExecutionProvider", "CUDAExecutionProvider"], "cuda"),
    ):
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda available=available: available)
        assert choose_device(Place()) == taken


def test_a_provider_gets_its_options_and_no_other_has_its_place(bundle, claimed, monkeypatch):
    asked: list[Any] = []

    def session(_graph: Any, _options: Any, **how: Any) -> Any:
        asked.append(how)
        raise RuntimeError("out of memory\nmore")

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    with pytest.raises(UserError, match=r"cannot load .* on cuda: out of memory$"):
        OnnxEngine(folder_of(bundle), place=Place(device="cuda", provider_options={"device_id": "1"}))
    wanted = [("CUDAExecutionProvider", {"device_id": "1"}), "CPUExecutionProvider"]
    assert asked == [{"providers": wanted, "enable_fallback": 0}]


def test_on_the_cpu_a_session_is_what_it_always_was(bundle, monkeypatch):
    asked: list[Any] = []
    create = onnxruntime.InferenceSession

    def session(graph: Any, options: Any, **how: Any) -> Any:
        asked.append(how)
        with pytest.raises(RuntimeError):
            options.get_session_config_entry(providers._ASSIGNMENT)
        return create(graph, options, **how)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    with Session(bundle, "onnx", threads=1) as opened:
        assert opened.device == "cpu" and opened.generate("the way", max_tokens=2).text
    assert asked == [{"providers": ["CPUExecutionProvider"], "enable_fallback": 0}] * 4


def test_off_the_cpu_the_cache_is_bound_for_each_pass(bundle, monkeypatch):
    chain, bound = BlockChain(folder_of(bundle), [2, 4], threads=1), []
    bind = CachedText._bind_cache
    monkeypatch.setattr(CachedText, "_bind_cache", lambda text, number: (bound.append(number), bind(text, number)))
    found = []
    for on_cpu in (True, False):
        chain.on_cpu, text = on_cpu, CachedText(chain)
        bound.clear()
        text.add(IDS)
        rows = [text.logits(2)]
        text.add([7])
        found.append(np.concatenate([*rows, text.logits(4)]))
        assert bound == ([] if on_cpu else [0, 0, 1])
    np.testing.assert_array_equal(*found)


def test_which_engine_and_layers():
    assert choose_engine(None, None, None, CUDA) == choose_engine("onnx", None, None, CUDA) == "onnx"
    assert choose_engine("llama.cpp", None, None, Place(device="cpu")) == "llama.cpp"
    assert llamacpp_server.gpu_layers(Place(device="cpu")) == (0, False)
    assert Place(gpu_layers=3, device="cpu").layers == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cuda"], "has no CUDAExecutionProvider: install onnxruntime-gpu"),
        (["--device", "cud"], "--device cud: there is no such device; there are: auto, cpu, cuda, dml, webgpu, coreml"),
        (
            ["--device", "cuda", "--engine", "llama.cpp"],
            "--device cuda is for ONNX Runtime; for llama.cpp it is --gpu-",
        ),
        (["--device", "cuda", "--gpu-layers", "3"], "--device cuda is for ONNX Runtime"),
        (["--device", "cuda", "--depth", "auto", "--memory-mb", "900"], "has no CUDAExecutionProvider"),
        (["--device", "cpu", "--provider-option", "device_id=1"], "--provider-option: the CPU has none"),
        (["--provider-option", "device_id"], "--provider-option device_id: must be KEY=VALUE"),
    ],
)
def test_what_cannot_be_is_one_line(bundle, options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["generate", str(bundle), "--prompt", "a", "--max-tokens", "2", "--threads", "1", *options])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and message in said and said.count("\n") == 1
