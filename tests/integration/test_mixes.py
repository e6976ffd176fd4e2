"""Every mix on three shapes, with and without an importance matrix: types and bytes of llama.cpp's own quantizer."""

from __future__ import annotations

import hashlib
import re
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
        """llama.cpp's file; there are those of the narrow shape."""
        return self.folder / f"{'weighted' if weighted else 'plain'}-{int(FILE_TYPES[mix][0])}.gguf"

    def job(self, weighted: bool, out: str) -> list[str]:
        """What llama.cpp is to make: arguments of tests/llama_quantize.py."""
        numbers = [
            str(int(FILE_TYPES[mix][0])) for mix, kind in GGUF_TYPES.items() if weighted or not kind.needs_importance
        ]
        imatrix = str(self.folder / "imatrix.safetensors") if weighted else ""
        return [str(self.folder / "F16.gguf"), out, ",".join(numbers), "", imatrix]


def llama_quantize(*jobs: list[str]) -> str:
    """What llama.cpp says."""
    script = Path(__file__).parents[1] / "llama_quantize.py"
    command = [sys.executable, str(script), *(argument for job in jobs for argument in job)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr


@pytest.fixture(scope="module")
def sources(shaken: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    return {name: prepared(shaken(**shape), tmp_path_factory) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def quantized(sources: dict[str, Source]) -> Source:
    """The narrow shape in every mix, by llama.cpp."""
    source = sources[NARROW]
    llama_quantize(
        *(source.job(w, str(source.folder / f"{n}-{{}}.gguf")) for w, n in ((False, "plain"), (True, "weighted")))
    )
    return source


@pytest.fixture(scope="module")
def sizes(sources: dict[str, Source]) -> dict[bool, dict[str, int]]:
    """The bytes that the narrow shape's files are to have, without and with an importance matrix."""
    return {weighted: plain_sizes(sources[NARROW].checkpoint, weighted, name="x") for weighted in (False, True)}


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


SAID = re.compile(r"\[ *\d+/ *\d+\] +(\S+) .*type = +f(?:16|32), size = .*?(?:-> .* MiB \((\w+)\))?$", re.MULTILINE)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("shape", SHAPES)
def test_types_are_those_of_llama_quantize(sources, shape, weighted):
    source = sources[shape]
    said = llama_quantize(source.job(weighted, "dry"))
    theirs = {
        int(part.split("\n", 1)[0]): {name: (kind or "").upper() for name, kind in SAID.findall(part)}
        for part in said.split("== ")[1:]
    }
    sizes = plain_sizes(source.checkpoint, weighted, name="x")
    seen = set()
    for mix in sizes:
        job = Conversion(source.checkpoint, mix, imatrix=source.imatrix if weighted else None, name="x")
        found = {t.name: t.kind.name for t in job.tensors}
        expected = theirs[int(FILE_TYPES[mix][0])]
        kept = {"F32", "F16"}  # what llama.cpp leaves as it is in the F16 file, it does not name
        assert {
            name: "" if kind in kept and not expected[name] else kind for name, kind in found.items()
        } == expected, mix
        seen.add(tuple(found.values()))
    assert len(seen) > 15 if shape == NARROW else len(seen) == len(sizes)  # wrong names of mixes would fall together


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("mix", GGUF_TYPES)
def test_bytes_are_those_of_llama_quantize(quantized, sizes, tmp_path, mix, weighted):
    ours = tmp_path / "ours.gguf"
    if GGUF_TYPES[mix].needs_importance and not weighted:
        with pytest.raises(UserError, match=f"GGUF type {mix} needs an importance matrix"):
            write_gguf(quantized.checkpoint, ours, mix)
        return
    write_gguf(quantized.checkpoint, ours, mix, imatrix=quantized.imatrix if weighted else None, name="x")
    theirs = quantized.theirs(mix, weighted)
    found, expected = tensors(ours), tensors(theirs)
    assert [name for name in found if found[name] != expected[name]] == []
    size = ours.stat().st_size
    assert size == theirs.stat().st_size == sizes[weighted][mix]
