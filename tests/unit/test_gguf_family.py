"""Several depths over one set of GGUF tensors: in real llama.cpp, in gguf-py, and joined into single files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from compress.core.errors import UserError
from compress.core.gguf_header import read_header, split_files
from compress.export.extract import join
from compress.export.gguf import write_gguf
from compress.export.gguf_family import check_family, family_name, measure_gguf, write_family
from compress.modeling.blocks import drop_blocks
from compress.modeling.checkpoint import save_checkpoint
from compress.modeling.families import FAMILIES
from compress.modeling.load import load_model, load_tokenizer
from compress.modeling.weights import count_parameters
from compress.runtime.engine import ScoringWindow
from compress.runtime.llamacpp_engine import LlamaCppEngine

TOLERANCE = 0.01  # nats, of every log-probability: llama.cpp keeps keys and values in float16
IDS = [(37 * i) % 450 + 3 for i in range(64)]
POSITIONS = [1, 2, 9, 20, 40, 63]
MIXED = {"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 8}
OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {"tied": False},
    "mistral": {},
    "qwen2": {"tied": False},
    "qwen3": {},
    "phi3": {},
    "gemma3_text": MIXED,
}
DEPTHS = [1, 3, 4]


def first_blocks(checkpoint: Path, depth: int, folder: Path) -> Path:
    """A checkpoint of its first blocks alone, by dropping the others."""
    model = load_model(checkpoint)
    drop_blocks(model, range(depth, model.config.num_hidden_layers))
    save_checkpoint(model, load_tokenizer(checkpoint), folder)
    return folder


def largest_difference(file: Path, checkpoint: Path) -> float:
    with torch.no_grad():
        expected = torch.log_softmax(load_model(checkpoint)(torch.tensor([IDS])).logits[0], -1).numpy()
    with LlamaCppEngine(file, threads=1, context=len(IDS), slots=1) as engine:
        found = engine.score([ScoringWindow(IDS, POSITIONS)])[0]
    assert all(score.complete for score in found)
    return max(float(np.abs(score.logprobs - expected[score.position - 1]).max()) for score in found)


def tensors_of(*files: Path) -> dict[str, tuple[str, bytes]]:
    return {t.name: (t.tensor_type.name, t.data.tobytes()) for f in files for t in gguf.GGUFReader(f).tensors}


def test_every_family_is_tested():
    assert sorted(OPTIONS) == sorted(FAMILIES)


@pytest.mark.parametrize("family", OPTIONS)
def test_every_depth_predicts_in_llama_cpp_what_torch_does(shaken, tmp_path, family):
    checkpoint = shaken(family, **OPTIONS[family])
    firsts = write_family(checkpoint, tmp_path / "m-F16", "F16", DEPTHS, name="m")
    architecture = FAMILIES[family].gguf.architecture
    check_family(tmp_path / "m-F16", DEPTHS)
    for depth, first in firsts.items():
        alone = first_blocks(checkpoint, depth, tmp_path / f"c{depth}")
        assert largest_difference(first, alone) < TOLERANCE
        header = read_header(first)
        assert header[f"{architecture}.block_count"] == depth
        assert header["general.name"] == ("m" if depth == 4 else f"m@{depth}")
        # What gguf-py reads from the parts is what an export of these blocks alone holds, which F16 does not round
        # by a block's place among the others.
        write_gguf(alone, tmp_path / "alone.gguf", "F16", name=header["general.name"])
        assert tensors_of(*split_files(first)) == tensors_of(tmp_path / "alone.gguf")
        join(first, tmp_path / f"one-{depth}.gguf")
        assert (tmp_path / f"one-{depth}.gguf").read_bytes() == (tmp_path / "alone.gguf").read_bytes()
        size = measure_gguf(first)
        assert size.parameters == count_parameters(alone) == count_parameters(checkpoint, depth)
        assert size.bytes == sum(file.stat().st_size for file in split_files(first))


def test_parts_are_shared_and_take_no_more_room(tiny, tmp_path):
    firsts = write_family(tiny(), tmp_path / "m-Q8_0", "Q8_0", [1, 2, 4], name="m")
    names = sorted(file.name for file in (tmp_path / "m-Q8_0").iterdir())
    assert names == sorted(
        [f"m-Q8_0-d1-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
        + [f"m-Q8_0-d2-{i:05d}-of-00004.gguf" for i in (1, 2, 3, 4)]
        + [f"m-Q8_0-d4-{i:05d}-of-00005.gguf" for i in (1, 2, 3, 4, 5)]
    )
    small, middle, whole = (split_files(first) for first in firsts.values())
    assert all(a.samefile(b) for files in (small, middle) for a, b in zip(files[1:], whole[1:], strict=False))
    assert len({file.stat().st_ino for file in (tmp_path / "m-Q8_0").iterdir()}) == 3 + 4
    assert [read_header(file)["split.no"] for file in whole] == [0, 1, 2, 3, 4]
    # The first parts hold metadata alone: that is all a further depth costs.
    assert all(not gguf.GGUFReader(files[0]).tensors for files in (small, middle, whole))


def test_types_are_those_of_the_deepest_mix(tiny, tmp_path):
    """At 8 blocks Q4_K_M gives more bits to the first, the last and every third between; of 3 it would be others."""
    checkpoint = tiny(blocks=8, hidden=64, intermediate=256)
    firsts = write_family(checkpoint, tmp_path / "f", "Q4_K_M", [3, 8])
    info = write_gguf(checkpoint, tmp_path / "all.gguf", "Q4_K_M")
    shallow = {name: kind for name, (kind, _) in tensors_of(*split_files(firsts[3])).items()}
    assert shallow == {name: info.tensor_types[name] for name in shallow} and len(shallow) == 3 * 9 + 2
    alone = write_gguf(first_blocks(checkpoint, 3, tmp_path / "c"), tmp_path / "3.gguf", "Q4_K_M").tensor_types
    assert alone != shallow
    join(firsts[3], tmp_path / "one.gguf")
    assert tensors_of(tmp_path / "one.gguf") == tensors_of(*split_files(firsts[3]))
    assert largest_difference(tmp_path / "one.gguf", tmp_path / "c") == largest_difference(firsts[3], tmp_path / "c")


def test_gemma_of_62_blocks_has_its_own_query_norms(shaken, tmp_path):
    """llama.cpp scales attention otherwise at 62 blocks, by the number alone: these small tensors cannot be shared."""
    options = {"hidden": 96, "heads": 3, "kv_heads": 1, "head_dim": 16, "intermediate": 32}
    checkpoint = shaken("gemma3_text", blocks=62, **options)
    firsts = write_family(checkpoint, tmp_path / "f", "F16", [2, 62])
    check_family(tmp_path / "f", [2, 62])
    for depth, first in firsts.items():
        names = [tensor.name for tensor in gguf.GGUFReader(first).tensors]
        assert names == [f"blk.{i}.attn_q_norm.weight" for i in range(depth)]
        alone = first_blocks(checkpoint, depth, tmp_path / f"c{depth}")
        assert largest_difference(first, alone) < 3 * TOLERANCE  # shared, they put depth 2 off by 0.24
        join(first, tmp_path / "one.gguf")
        assert list(tensors_of(tmp_path / "one.gguf")) == list(
            write_gguf(alone, tmp_path / "a.gguf", "F16").tensor_types
        )


def test_copies_that_break_links_still_load(shaken, tmp_path):
    checkpoint = shaken()
    write_family(checkpoint, tmp_path / "f", "F16", [2, 4])
    shutil.copytree(tmp_path / "f", tmp_path / "copy" / "f")
    assert all(file.stat().st_nlink == 1 for file in (tmp_path / "copy" / "f").iterdir())
    check_family(tmp_path / "copy" / "f", [2, 4])
    first = tmp_path / "copy" / "f" / family_name("f", 2, 1, [2, 4])
    shutil.rmtree(tmp_path / "f")
    assert largest_difference(first, first_blocks(checkpoint, 2, tmp_path / "c")) < TOLERANCE


def test_without_hard_links_there_are_copies(tiny, tmp_path, monkeypatch):
    write_family(tiny(), tmp_path / "a" / "f", "F16", [2, 4])

    def refuse(*_args: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    write_family(tiny(), tmp_path / "b" / "f", "F16", [2, 4])
    check_family(tmp_path / "b" / "f", [2, 4])
    for file in (tmp_path / "a" / "f").iterdir():
        copy = tmp_path / "b" / "f" / file.name
        assert copy.read_bytes() == file.read_bytes() and copy.stat().st_nlink == 1


def test_a_failure_leaves_nothing(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("compress.export.gguf_family._write_first", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_family(tiny(), tmp_path / "f", "F16", [2, 4])
    assert not list(tmp_path.iterdir())


def test_wrong_and_missing_parts_are_found(tiny, tmp_path):
    write_family(tiny(), tmp_path / "f", "F16", [1, 2, 4])
    names = {d: [family_name("f", d, i, [1, 2, 4]) for i in range(1, n)] for d, n in ((1, 4), (2, 5), (4, 6))}
    folder = tmp_path / "f"

    def broken(change: Any) -> Path:
        shutil.rmtree(tmp_path / "g", ignore_errors=True)
        shutil.copytree(folder, tmp_path / "g" / "f")
        change(tmp_path / "g" / "f")
        return tmp_path / "g" / "f"

    other = broken(lambda f: shutil.copy(f / names[4][3], f / names[2][2]))
    with pytest.raises(UserError, match=r"d2-00001-of-00004\.gguf and its parts do not make up a model of 2 blocks"):
        check_family(other, [1, 2, 4])
    other = broken(lambda f: shutil.copy(f / names[2][0], f / names[1][0]))
    with pytest.raises(UserError, match=r"is the first of 4 parts, but its name says 3"):
        check_family(other, [1, 2, 4])

    def flip(f: Path) -> None:
        data = bytearray((f / names[1][1]).read_bytes())
        data[-100] ^= 1
        (f / names[1][1]).write_bytes(data)

    with pytest.raises(UserError, match=r"d1-00002-of-00003\.gguf should be identical to f-d4-00002-of-00005\.gguf"):
        check_family(broken(flip), [1, 2, 4])
    other = broken(lambda f: (f / names[2][3]).unlink())
    with pytest.raises(UserError, match=r"the first of 4 parts, of which f-d2-00004-of-00004\.gguf is missing"):
        LlamaCppEngine(other / names[2][0])
    with pytest.raises(UserError, match=r"is part 2 of a model; name the first: f-d4-00001-of-00005\.gguf"):
        LlamaCppEngine(folder / names[4][1])
