"""Every mix on three shapes, with and without an importance matrix: types and bytes of llama.cpp's own quantizer."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from compress.core.errors import UserError
from compress.export.gguf import Conversion, write_gguf
from compress.export.gguf_sizes import plain_sizes
from compress.export.gguf_source import GgufSource
from compress.export.imatrix import save_imatrix
from compress.export.mixes import FILE_TYPES
from compress.modeling.checkpoint import save_checkpoint
from compress.modeling.load import load_config, load_model, load_tokenizer
from compress.runtime.artifact_types import GGUF_TYPES

NARROW = "narrow, tied, three queries per key"
WIDE = {"hidden": 256, "intermediate": 256, "blocks": 8}
# Rows of 96 are, like SmolLM2's of 576, a multiple of 32 and not of 256. Of 16 blocks one is in the first sixteenth.
SHAPES: dict[str, dict[str, Any]] = {
    NARROW: {"hidden": 96, "heads": 3, "kv_heads": 1, "intermediate": 256, "blocks": 16},
    "untied, four queries per key": {**WIDE, "heads": 8, "kv_heads": 2, "tied": False},
    "tied, a key per query": {**WIDE, "heads": 4, "kv_heads": 4},
}


@dataclass(frozen=True)
class Source:
    folder: Path  # of the files
    checkpoint: Path  # weights that float16 holds exactly
    imatrix: dict[str, np.ndarray]

    def theirs(self, mix: str, weighted: bool) -> Path:
        """llama.cpp's file."""
        return self.folder / f"{'weighted' if weighted else 'plain'}-{int(FILE_TYPES[mix][0])}.gguf"

    def jobs(self) -> list[str]:
        """What llama.cpp is to make: arguments of tests/llama_quantize.py."""
        found = []
        for name, imatrix in ("plain", ""), ("weighted", str(self.folder / "imatrix.safetensors")):
            mixes = [mix for mix, kind in GGUF_TYPES.items() if imatrix or not kind.needs_importance]
            numbers = ",".join(str(int(FILE_TYPES[mix][0])) for mix in mixes)
            found += [str(self.folder / "F16.gguf"), str(self.folder / f"{name}-{{}}.gguf"), numbers, "", imatrix]
        return found


@pytest.fixture(scope="module")
def sources(shaken: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    """All shapes, quantized by llama.cpp in one process: preparing its tables of one and two bits takes seconds."""
    found = {name: prepared(shaken(**shape), tmp_path_factory) for name, shape in SHAPES.items()}
    script = Path(__file__).parents[1] / "llama_quantize.py"
    command = [sys.executable, str(script), *(argument for source in found.values() for argument in source.jobs())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return found


def prepared(made: Path, folders: pytest.TempPathFactory) -> Source:
    folder = folders.mktemp("mixes")
    save_checkpoint(load_model(made).half().float(), load_tokenizer(made), folder / "half")
    write_gguf(folder / "half", folder / "F16.gguf", "F16", name="x")
    draw = np.random.default_rng(5)
    shapes = GgufSource(folder / "half", load_config(folder / "half")).shapes
    names = [name for name, shape in shapes.items() if name.startswith("blk.") and len(shape) == 2]
    imatrix = {name: draw.lognormal(0, 1, shapes[name][1]).astype(np.float32) for name in names}
    save_imatrix(imatrix, folder / "imatrix.safetensors")
    return Source(folder, folder / "half", imatrix)


def tensors(file: Path) -> dict[str, tuple[str, str]]:
    reader = gguf.GGUFReader(file)
    return {t.name: (t.tensor_type.name, hashlib.sha256(t.data.tobytes()).hexdigest()) for t in reader.tensors}


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("mix", GGUF_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_types_and_bytes_are_those_of_llama_quantize(sources, tmp_path, shape, mix, weighted):
    source, ours = sources[shape], tmp_path / "ours.gguf"
    if GGUF_TYPES[mix].needs_importance and not weighted:
        with pytest.raises(UserError, match=f"GGUF type {mix} needs an importance matrix"):
            write_gguf(source.checkpoint, ours, mix)
        return
    expected, imatrix = tensors(source.theirs(mix, weighted)), source.imatrix if weighted else None
    job = Conversion(source.checkpoint, mix, imatrix=imatrix, name="x")
    assert {t.name: t.kind.name for t in job.tensors} == {name: kind for name, (kind, _) in expected.items()}
    size = source.theirs(mix, weighted).stat().st_size
    assert plain_sizes(source.checkpoint, weighted, name="x")[mix] == size
    if shape == NARROW or not GGUF_TYPES[mix].needs_importance:  # which take long
        write_gguf(source.checkpoint, ours, mix, imatrix=imatrix, name="x")
        found = tensors(ours)
        assert [name for name in found if found[name] != expected[name]] == []
        assert ours.stat().st_size == size


def test_all_mixes_differ_where_rows_fit(sources):
    """Otherwise wrong names would pass."""
    source = sources["untied, four queries per key"]
    hashes = [hashlib.sha256(source.theirs(mix, True).read_bytes()).hexdigest() for mix in GGUF_TYPES]
    assert len(set(hashes)) == len(hashes)
