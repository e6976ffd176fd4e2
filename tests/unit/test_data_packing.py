from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compress.core.errors import UserError
from compress.core.stage import Inputs
from compress.data.calibration import calibration_batches
from compress.data.chat import Encoded
from compress.data.packing import Batch, pack
from compress.data.rows import Row, write_rows
from compress.modeling.load import load_model, load_tokenizer
from compress.records.manifest import StageManifest


def random_rows(sizes: list[int], seed: int = 0) -> list[Encoded]:
    draw = random.Random(seed)
    return [Encoded([draw.randrange(3, 300) for _ in range(n)], [draw.random() < 0.6 for _ in range(n)]) for n in sizes]


def unpack(batches: list[Batch]) -> list[tuple[list[int], list[bool]]]:
    """The rows again, read off the segment numbers alone."""
    found = []
    for batch in batches:
        for b in range(batch.input_ids.shape[0]):
            for segment in range(int(batch.segment_ids[b].max()) + 1):
                at = batch.segment_ids[b] == segment
                assert batch.position_ids[b][at].tolist() == list(range(int(at.sum())))
                found.append((batch.input_ids[b][at].tolist(), batch.loss_mask[b][at].tolist()))
    return found


def test_every_row_is_packed_once_and_nothing_else_is_learned() -> None:
    rows = random_rows([1, 7, 30, 12, 64, 3, 1, 50, 90, 2, 33, 0, 8])
    batches = pack(rows, 64, 2, 9)
    expected = [(r.input_ids[:64], [False, *r.loss_mask[1:64]]) for r in rows if r.input_ids]
    assert sorted(unpack(batches)) == sorted(expected)
    for batch in batches:
        padding = batch.segment_ids < 0
        assert (batch.input_ids[padding] == 9).all() and not batch.loss_mask[padding].any()
        assert batch.input_ids.shape[0] <= 2 and batch.input_ids.shape[1] <= 64
        assert not padding.all(0).any()  # as narrow as its longest sequence
    assert sum(batch.tokens for batch in batches) == sum(len(ids) for ids, _ in expected)
    assert sum(batch.targets for batch in batches) == sum(sum(mask) for _, mask in expected)


def test_packing_is_tight_and_deterministic() -> None:
    rows = random_rows([random.Random(3).randrange(5, 60) for _ in range(1)] + [17, 40, 21, 33, 9, 55, 12, 28] * 20)
    first, second = pack(rows, 64, 4, 0), pack(rows, 64, 4, 0)
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(first, second, strict=True))
    sequences = sum(batch.input_ids.shape[0] for batch in first)
    assert sequences <= 1.1 * sum(batch.tokens for batch in first) / 64 + 1


def test_grouped_by_length_less_is_padding_and_no_row_is_lost() -> None:
    draw = random.Random(5)
    rows = random_rows([draw.randrange(20, 64) for _ in range(60)])
    plain, grouped = (pack(rows, 64, 4, 9, grouped=on) for on in (False, True))
    assert sorted(unpack(plain)) == sorted(unpack(grouped))
    padding = [sum(int((batch.segment_ids < 0).sum()) for batch in batches) for batches in (plain, grouped)]
    assert padding[1] < 0.4 * padding[0]
    alone = [[batch.input_ids.tolist() for batch in pack(rows, 64, 1, 9, grouped=on)] for on in (False, True)]
    assert alone[0] == alone[1]  # a sequence alone has no padding, and keeps its place


def test_tokens_know_where_they_are_from() -> None:
    rows = [Encoded(ids, [True] * len(ids), row, start) for ids, row, start in (([5, 6, 7], 4, 0), ([8, 9], 4, 3))]
    (batch,) = pack([*rows, Encoded([3] * 9, [True] * 9)], 8, 2, 0)
    found = [
        list(zip(ids, origin, strict=True))
        for ids, origin in zip(batch.input_ids.tolist(), batch.origin.tolist(), strict=True)
    ]
    assert found[0][:5] == [(5, [4, 0]), (6, [4, 1]), (7, [4, 2]), (8, [4, 3]), (9, [4, 4])]
    assert found[0][5:] == [(0, [-1, -1])] * 3 and all(origin[0] == -1 for _, origin in found[1])
    assert torch.equal(batch.to("cpu").origin, batch.origin)


def test_nothing_to_pack_is_refused() -> None:
    for rows in ([], [Encoded([], [])]):
        with pytest.raises(UserError, match="data is empty"):
            pack(rows, 64, 2, 0)


FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("mistral", {"sliding_window": 8}),
    ("gemma3_text", {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}),
    ("qwen3", {}),
]


@pytest.mark.parametrize(("family", "options"), FAMILIES)
def test_packed_rows_do_not_see_each_other(tiny: Callable[..., Path], family: str, options: dict[str, Any]) -> None:
    model = load_model(tiny(family, **options))
    rows = random_rows([20, 1, 13, 1, 29, 40, 2, 11])
    batches = pack(rows, 48, 3, 0)
    assert any(batch.segment_ids.max() >= 2 for batch in batches)  # rows do share sequences
    compared = 0
    with torch.no_grad():
        for batch in batches:
            logits = model(**batch.model_inputs()).logits
            assert torch.isfinite(logits).all()
            for b in range(logits.shape[0]):
                for segment in range(int(batch.segment_ids[b].max()) + 1):
                    at = batch.segment_ids[b] == segment
                    alone = model(input_ids=batch.input_ids[b][at][None], use_cache=False).logits[0]
                    torch.testing.assert_close(logits[b][at], alone, atol=1e-5, rtol=1e-5)
                    compared += 1
    assert compared == len(rows)


def test_calibration_leaves_out_what_stands_beside_the_sources_own_rows(
    tiny: Callable[..., Path], tmp_path: Path, manifest_of: Callable[..., StageManifest]
) -> None:
    tokenizer = load_tokenizer(tiny())
    rows = [Row(i, "train", text="the way of many " * 4, source=("magpie", "book.txt")[i % 2]) for i in range(6)]
    write_rows(tmp_path, rows)
    data = Inputs(tmp_path, tmp_path, {"data": tmp_path})

    def tokens(own: bool) -> int:
        batches = calibration_batches(data, tokenizer, tokens=10**6, length=64, batch=1, own=own)
        return sum(batch.tokens for batch in batches)

    whole = tokens(own=False)
    assert tokens(own=True) == whole  # nothing tells them apart
    manifest_of(stage="data", metrics={"shares": {"magpie": {}, "book.txt": {}}}).write(tmp_path)
    assert tokens(own=True) == whole / 2 and tokens(own=False) == whole
    manifest_of(stage="data", metrics={"shares": None}).write(tmp_path)
    assert tokens(own=True) == whole


def test_calibration_takes_training_rows_up_to_a_count(tiny: Callable[..., Path], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny())
    ask = [{"role": "user", "content": "the way"}, {"role": "assistant", "content": "of many people " * 5}]
    write_rows(tmp_path, [Row(0, "train", ask), Row(1, "heldout", text="x " * 400), Row(2, "train", text="see " * 300)])
    data = Inputs(tmp_path, tmp_path, {"data": tmp_path})
    batches = calibration_batches(data, tokenizer, tokens=150, length=64, batch=2)
    assert sum(batch.tokens for batch in batches) == 150
    text = tmp_path / "text.txt"
    text.write_text("the way of many people é " * 50, encoding="utf-8")
    named = calibration_batches(data, tokenizer, tokens=100, length=64, batch=2, text=text)
    assert sum(batch.tokens for batch in named) == 100
    assert tokenizer.decode(named[0].input_ids[0]).startswith("the way of many people é the")
    bare = Inputs(tmp_path, tmp_path)
    with pytest.raises(UserError, match="no calibration data: add a `data` section"):
        calibration_batches(bare, tokenizer, tokens=10, length=64, batch=2)
    with pytest.raises(UserError, match="does not exist"):
        calibration_batches(bare, tokenizer, tokens=10, length=64, batch=2, text=tmp_path / "none.txt")
    text.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        calibration_batches(bare, tokenizer, tokens=10, length=64, batch=2, text=text)
    text.write_text("")
    with pytest.raises(UserError, match="fewer than two tokens"):
        calibration_batches(bare, tokenizer, tokens=10, length=64, batch=2, text=text)
