"""Where runtimes run files: layers on a GPU in llama.cpp. The GPU is a pretended one; what is asked of it is real."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from compress.cli import main as cli
from compress.core.errors import UserError
from compress.core.place import Place
from compress.core.stage import Context
from compress.data.config import LlamaCppSettings
from compress.data.engines import open_engine as open_writer
from compress.export.gguf import write_gguf
from compress.kv.settings import KvBudget
from compress.runtime import llamacpp_server
from compress.runtime.llamacpp_engine import LlamaCppEngine
from compress.runtime.llamacpp_server import device_name, open_server
from compress.runtime.measure import measure
from compress.runtime.session import Session, choose_engine, depth_artifacts

xllamacpp: Any = import_module("xllamacpp")  # it comes without types
NO_GPU = r"--gpu-layers 3: llama\.cpp as installed \(xllamacpp .*\) finds no GPU, so they would run on the CPU"


def file_of(bundle: Path, depth: int = 4) -> Path:
    with Session(bundle, "llama.cpp", threads=1, context=64) as session:
        return bundle / depth_artifacts(session.manifest, "llama.cpp", "F16")[depth].path


@pytest.fixture
def gpu(monkeypatch) -> list[Any]:
    """A llama.cpp with one GPU; the list gets the parameters of each server that is opened. They are stopped there."""
    opened: list[Any] = []
    kinds = xllamacpp.ggml_backend_dev_type
    devices = [
        {"name": "CUDA0", "description": "Pretended", "type": kinds.GGML_BACKEND_DEVICE_TYPE_GPU},
        *xllamacpp.get_device_info(),
    ]

    def server(parameters: Any) -> Any:
        opened.append(parameters)
        raise RuntimeError

    names = {name: getattr(xllamacpp, name) for name in ("CommonParams", "common_speculative_type", "ggml_type")}
    fake = SimpleNamespace(**names, get_device_info=lambda: devices, Server=server)
    monkeypatch.setattr(llamacpp_server, "_import", lambda: fake)
    monkeypatch.setattr(llamacpp_server, "LOG_SECONDS", 0)
    return opened


@pytest.mark.parametrize(
    ("place", "layers", "fit", "name"),
    [
        (Place(), -1, True, "CUDA0 (Pretended)"),
        (Place(gpu_layers=0), 0, False, "cpu"),
        (Place(gpu_layers=3), 3, False, "CUDA0 (Pretended) with 3 layers"),
    ],
)
def test_llamacpp_is_given_the_layers(gpu, tmp_path, place, layers, fit, name):
    with pytest.raises(UserError, match="cannot load"):
        open_server(tmp_path / "a.gguf", 1, 1, 64, draft=tmp_path / "b.gguf", place=place)
    parameters = gpu[0]
    assert (parameters.n_gpu_layers, parameters.fit_params) == (layers, fit)
    assert parameters.speculative.draft.n_gpu_layers == layers
    assert device_name(place) == name


def test_without_a_gpu_nothing_is_fitted_and_the_cpu_is_named(bundle):
    assert llamacpp_server.gpu_layers(Place()) == (-1, False)
    with Session(bundle, "llama.cpp", threads=1, context=64) as session:
        assert session.device == "cpu"


def test_layers_without_a_gpu_are_an_error_wherever_files_are_opened(bundle, tiny, tmp_path):
    place, file = Place(gpu_layers=3), file_of(bundle)
    with pytest.raises(UserError, match=NO_GPU):
        Session(bundle, place=place)
    with pytest.raises(UserError, match=NO_GPU):
        LlamaCppEngine(file, place=place)
    with pytest.raises(UserError, match=NO_GPU):
        measure(file, prompt_tokens=4, new_tokens=2, place=place)
    write_gguf(base := tiny(), tmp_path / "base.gguf", "F16")
    settings, context = LlamaCppSettings(gguf=str(tmp_path / "base.gguf"), threads=1), Context(place=place)
    with pytest.raises(UserError, match=NO_GPU):
        open_writer(settings, base, context, 32, 1)


def test_which_engine():
    place = Place(gpu_layers=0)
    assert choose_engine(None, KvBudget(64), None, place) == choose_engine(None, None, None, place) == "llama.cpp"
    assert choose_engine("onnx", None, None, Place()) == "onnx"
    with pytest.raises(UserError, match=r"--gpu-layers is for llama\.cpp, not for onnx: leave it out, or add --engine"):
        choose_engine("onnx", None, None, place)


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("generate", ["--gpu-layers", "3"], "finds no GPU"),
        ("generate", ["--gpu-layers", "many"], "--gpu-layers many: must be a number or auto"),
        ("generate", ["--gpu-layers=-2"], "--gpu-layers -2: must be at least 0, or auto"),
        ("generate", ["--gpu-layers", "3", "--engine", "onnx"], "--gpu-layers is for llama.cpp, not for onnx"),
        ("generate", ["--gpu-layers", "3", "--depth", "auto", "--memory-mb", "900"], "finds no GPU"),
        ("generate", ["--gpu-layers", "3", "--kv-budget", "64", "--kv-policy", "recent"], "runs on the CPU: leave out"),
        ("chat", ["--gpu-layers", "3"], "finds no GPU"),
        ("serve", ["--gpu-layers", "3", "--port", "0"], "finds no GPU"),
        ("bench", ["--gpu-layers", "3"], "finds no GPU"),
    ],
)
def test_what_cannot_be_is_one_line(bundle, command, options, message, capsys):
    prompt = ["--prompt", "a", "--max-tokens", "2"] if command == "generate" else []
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, str(bundle), *prompt, *options])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and message in said and said.count("\n") == 1


def test_generate_says_where_it_ran(bundle, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["generate", str(bundle), "-p", "a", "--max-tokens", "2", "--threads", "1", "--gpu-layers", "auto"])
    assert stopped.value.code == 0 and "llama.cpp F16 on cpu; depth 4" in capsys.readouterr().err
