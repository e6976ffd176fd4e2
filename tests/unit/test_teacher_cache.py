"""The teacher as the data stage writes it down: what it holds, how rows find theirs, and how it survives a kill."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compress.core.errors import UserError
from compress.core.stage import WORK, Context, Inputs, Progress
from compress.data import stage as data_stage
from compress.data import teacher_cache
from compress.data.chat import Encoded, encode_rows
from compress.data.config import DatasetConfig, TeacherConfig
from compress.data.packing import pack
from compress.data.rows import Row
from compress.data.teacher_cache import TeacherCache, read_top_k, top_k, write_teacher
from compress.modeling.agreement import response_positions
from compress.modeling.load import load_model, load_tokenizer

LENGTH, SEED = 64, 7
WORDS = "the way of many people is which model time and look so é 42".split()


def talk(draw: random.Random) -> list[dict[str, str]]:
    turns = [" ".join(draw.choices(WORDS, k=draw.randrange(*span))) for span in ((2, 6), (4, 22))]
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant"), turns, strict=True)]


@pytest.fixture(scope="module")
def base(tiny: Callable[..., Path]) -> Path:
    return tiny(blocks=2, hidden=32, heads=2, kv_heads=1, intermediate=48, seed=2)


def texts() -> list[Row]:
    draw = random.Random(9)
    rows: list[Any] = [Row(7 * i, "train", text=" ".join(draw.choices(WORDS, k=n))) for i, n in enumerate((30, 90, 4))]
    return [*rows, Row(30, "heldout", text="the people is"), Row(40, "train", talk(draw)), Row(41, "train", talk(draw))]


def reference(base: Path, window: Encoded, k: int) -> list[tuple[list[int], list[float]]]:
    """Per target the k likeliest tokens, and their log-probabilities with the rest's; the window runs alone."""
    with torch.no_grad():
        log_probs = load_model(base)(torch.tensor([window.input_ids])).logits[0].double().log_softmax(-1)
    found = []
    for t, learned in enumerate(window.loss_mask):
        if learned:
            order = sorted(range(log_probs.shape[1]), key=lambda v, t=t: -float(log_probs[t - 1, v]))
            rest = sum(float(log_probs[t - 1, v].exp()) for v in order[k:])
            found.append((order[:k], [float(log_probs[t - 1, v]) for v in order[:k]] + [float(np.log(rest))]))
    return found


@pytest.mark.parametrize("batch", [1, 3])
def test_the_cache_holds_the_likeliest_tokens_of_every_target(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr(teacher_cache, "PART", 2)
    (tmp_path / WORK).mkdir()
    rows, tokenizer = texts(), load_tokenizer(base)
    config = TeacherConfig(top_k=3, batch=batch)
    size = write_teacher(config, base, rows[::-1], tokenizer, LENGTH, tmp_path, Context())
    windows = encode_rows(tokenizer, [row for row in rows if row.split == "train"], LENGTH)
    assert len({window.row for window in windows}) == 5 < len(windows)  # a text is several windows
    wanted = [target for window in windows for target in reference(base, window, 3)]
    assert size.targets == len(wanted)
    cache = TeacherCache(tmp_path)
    assert isinstance(cache.tokens, np.memmap) and cache.tokens.dtype == np.uint16
    assert cache.tokens.tolist() == [tokens for tokens, _ in wanted]
    np.testing.assert_allclose(cache.log_probs, [values for _, values in wanted], rtol=6e-4, atol=1e-5)
    names = ("windows", "positions", "targets", "tokens", "log_probs")
    assert {file.name for file in (tmp_path / "teacher").iterdir()} == {f"{name}.npy" for name in names}


def test_packed_rows_find_what_was_said_of_them(base: Path, tmp_path: Path) -> None:
    """However they are ordered, packed and cut."""
    (tmp_path / WORK).mkdir()
    rows, tokenizer = texts(), load_tokenizer(base)
    write_teacher(TeacherConfig(top_k=3), base, rows, tokenizer, LENGTH, tmp_path, Context())
    cache = TeacherCache(tmp_path)
    windows = encode_rows(tokenizer, [row for row in rows if row.split == "train"], LENGTH)
    said = {}
    for window in windows:
        learned = [t for t, marked in enumerate(window.loss_mask) if marked]
        for t, target in zip(learned, reference(base, window, 3), strict=True):
            said[window.row, window.start, t] = target
    random.Random(1).shuffle(windows)
    for length, size in ((LENGTH, 2), (LENGTH - 25, 3)):  # the second cuts rows
        for batch in pack(windows, length, size, 9):
            tokens, log_probs = read_top_k(cache, batch)
            assert (tokens.dtype, log_probs.dtype) == (torch.long, torch.float32)
            positions, targets = response_positions(batch.input_ids, batch.loss_mask)
            assert len(positions) == len(tokens) == len(targets)
            places, within = batch.origin.flatten(0, 1)[positions + 1], batch.position_ids.flatten()[positions + 1]
            for n, (row, number) in enumerate(places.tolist()):
                t = int(within[n])
                wanted = said[row, number - t, t]
                assert tokens[n].tolist() == wanted[0]
                assert log_probs[n].tolist() == pytest.approx(wanted[1], rel=6e-4, abs=1e-5)


def test_other_windows_of_a_text_are_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / WORK).mkdir()
    rows, tokenizer = texts(), load_tokenizer(base)
    write_teacher(TeacherConfig(top_k=3), base, rows, tokenizer, LENGTH, tmp_path, Context())
    cache = TeacherCache(tmp_path)
    train = [row for row in rows if row.split == "train"]
    for length in (LENGTH // 2, LENGTH * 2):
        with pytest.raises(UserError, match=r"does not match row 7 from its token \d+ on.*distill.length must"):
            for batch in pack(encode_rows(tokenizer, train[1:2], length), length, 1, 9):
                cache.find(batch)
    encoded = encode_rows(tokenizer, train[-1:], LENGTH)[0]
    other = [*encoded.input_ids[:-3], 5, *encoded.input_ids[-2:]]
    with pytest.raises(UserError, match="does not match row 41 from its token 0 on"):  # other words
        cache.find(pack([Encoded(other, encoded.loss_mask, encoded.row)], LENGTH, 1, 9)[0])
    cache.find(pack([encoded], LENGTH, 1, 9)[0])


def test_a_killed_cache_ends_with_the_same_bytes(
    killer: Callable[[int], Progress], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_cache, "PART", 2)
    runs: list[int] = []
    plain = teacher_cache._fill

    def count(*args: Any) -> None:
        runs.append(1)
        plain(*args)

    monkeypatch.setattr(teacher_cache, "_fill", count)
    rows, tokenizer = texts(), load_tokenizer(base)

    def write(folder: Path, calls: int = 0) -> dict[str, bytes]:
        (folder / WORK).mkdir(parents=True, exist_ok=True)
        write_teacher(TeacherConfig(top_k=3), base, rows, tokenizer, LENGTH, folder, Context(progress=killer(calls)))
        return {file.name: file.read_bytes() for file in sorted((folder / "teacher").iterdir())}

    whole, parts = write(tmp_path / "whole"), len(runs)
    for calls in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "killed", calls)
    assert not (tmp_path / "killed" / "teacher").exists()
    assert write(tmp_path / "killed") == whole
    assert len(runs) == 2 * parts  # no part twice
    assert write(tmp_path / "killed") == whole and len(runs) == 2 * parts  # killed after it was whole


def test_the_data_stage_writes_it(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    draw = random.Random(2)
    file.write_text("".join(json.dumps({"messages": talk(draw)}) + "\n" for _ in range(9)))
    plain = {"source": "dataset", "path": str(file), "messages": "messages"}
    for name, teacher in (("with", {"top_k": 100_000}), ("without", None)):
        (tmp_path / name).mkdir()
        config = DatasetConfig.model_validate(plain | {"teacher": teacher})
        found = data_stage.run(config, Inputs(base, base), tmp_path / name, Context(seed=SEED))
        assert ("teacher_targets" in found) is (tmp_path / name / "teacher").exists() is bool(teacher)
    assert (tmp_path / "with" / "rows.parquet").read_bytes() == (tmp_path / "without" / "rows.parquet").read_bytes()
    cache = TeacherCache(tmp_path / "with")
    assert cache.tokens.shape[1] == load_model(base).config.vocab_size  # there are no more
    assert np.isneginf(cache.log_probs[:, -1]).all()
    np.testing.assert_allclose(np.exp(cache.log_probs.astype(np.float64)).sum(1), 1, rtol=2e-3)


def test_the_rest_is_what_the_others_have_together() -> None:
    logits = torch.tensor([[1.0, 30.0, -60.0, 2.0], [0.0, 0.0, 1.0, 5.0]])
    tokens, log_probs = top_k(logits.clone(), 2)
    exact = logits.double().log_softmax(-1)
    assert tokens.tolist() == [[1, 3], [3, 2]]
    wanted = [
        [exact[0, 1], exact[0, 3], exact[0, [0, 2]].logsumexp(0)],
        [exact[1, 3], exact[1, 2], exact[1, :2].logsumexp(0)],
    ]
    torch.testing.assert_close(log_probs.double(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-6, atol=1e-7)
