"""Plain text a model writes from random first tokens: the `texts` source of the data stage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compress.core.errors import UserError
from compress.core.stage import WORK, Context, Inputs
from compress.data.chat import load_encoded
from compress.data.config import TextsConfig
from compress.data.rows import read_rows
from compress.data.sampling import Sampling, row_seed, sample
from compress.data.stage import check, run
from compress.data.texts import Texts
from compress.data.writing import Writer
from compress.modeling.load import load_model, load_tokenizer


def settings(**values: Any) -> TextsConfig:
    return TextsConfig.model_validate(
        {"source": "texts", "rows": 12, "batch": 5, "tokens": 24, "heldout": 0.25} | values
    )


def make(base: Path, out: Path, config: TextsConfig, seed: int = 7) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    context = Context(seed=seed)
    check(config, base, context)
    return run(config, Inputs(base, base), out, context)


def test_rows_are_plain_text_of_the_model_itself(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Each row is its first token, drawn by its own seed, and what the model goes on with."""
    base, config = tiny(), settings()
    stats = make(base, tmp_path / "out", config)
    rows = [row for split in ("train", "heldout") for row in read_rows(tmp_path / "out", split)]
    assert (stats["rows"], stats["heldout"], len(rows)) == (12, 3, 12)
    model, tokenizer = load_model(base), load_tokenizer(base)
    texts = Texts(config, base, tokenizer, Context(seed=7), tmp_path)
    batch = range(0, 5)
    seeds = [row_seed(7, number, "text") for number in batch]
    starts = [texts.first[seed % len(texts.first)] for seed in seeds]
    how = Sampling(24, 1.0, 0.95, 0)
    drawn = sample(model, [[s] for s in starts], seeds, how, stop=texts.stop, banned=texts.banned)
    wanted = {n: tokenizer.decode([s, *d.tokens]) for n, s, d in zip(batch, starts, drawn, strict=True)}
    for row in rows:
        assert row.messages is None and row.source == "texts" and row.seed == row_seed(7, row.id, "text")
        assert row.id not in wanted or row.text == wanted[row.id]
    assert len({row.text for row in rows}) == 12
    encoded = load_encoded(tmp_path / "out", tokenizer, "train", 512)
    assert all(not e.loss_mask[0] and all(e.loss_mask[1:]) for e in encoded)


def test_openings_take_turns_and_are_part_of_the_text(tiny: Callable[..., Path], tmp_path: Path) -> None:
    openings = ["The river ", "def "]
    make(tiny(), tmp_path / "out", settings(openings=openings))
    rows = read_rows(tmp_path / "out")
    assert len({row.text for row in rows}) == len(rows) == 12
    for row in rows:
        opening = openings[row.id % 2]
        assert row.text is not None and row.text.startswith(opening) and len(row.text) > len(opening)
    with pytest.raises(ValueError, match="openings"):
        settings(openings=[""])


def test_first_tokens_are_text_and_never_special(tiny: Callable[..., Path], tmp_path: Path) -> None:
    tokenizer: Any = load_tokenizer(tiny())
    first = Texts(settings(), tiny(), tokenizer, Context(), tmp_path).first
    pieces = [tokenizer.decode([token]) for token in first]
    assert len(first) > 50 and not set(first) & set(tokenizer.all_special_ids)
    assert all(any(c.isalnum() for c in piece) and "\ufffd" not in piece for piece in pieces)


def test_a_tokenizer_that_begins_texts_does_so_here(tiny: Callable[..., Path], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny())

    class Beginning:
        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def __len__(self) -> int:
            return len(tokenizer)

        def __call__(self, text: str, **options: Any) -> Any:
            found = tokenizer(text, **options)
            found["input_ids"] = [1, *found["input_ids"]]
            return found

    assert Texts(settings(), tiny(), Beginning(), Context(), tmp_path).begin == [1]


def test_a_model_without_a_chat_template_will_do(tiny: Callable[..., Path], tmp_path: Path) -> None:
    import shutil

    base = tmp_path / "base"
    shutil.copytree(tiny(), base)
    (base / "chat_template.jinja").unlink()
    assert make(base, tmp_path / "out", settings())["rows"] == 12


def test_killed_and_resumed_is_the_same(tiny: Callable[..., Path], tmp_path: Path) -> None:
    base, config = tiny(), settings()
    make(base, tmp_path / "whole", config)
    parts = sorted((tmp_path / "whole" / WORK / "parts").iterdir())
    resumed = tmp_path / "resumed" / WORK / "parts"
    resumed.mkdir(parents=True)
    (resumed / parts[0].name).write_bytes(parts[0].read_bytes())
    make(base, tmp_path / "resumed", config)
    for name in ("rows.parquet", "stats.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes()
    make(base, tmp_path / "other", config, seed=8)
    assert (tmp_path / "other" / "rows.parquet").read_bytes() != (tmp_path / "whole" / "rows.parquet").read_bytes()


def test_loops_duplicates_and_empties_are_dropped_and_counted(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.data.sampling import Sampled

    monkeypatch.setattr(Texts, "_start", lambda self, row, seed: [40], raising=True)
    scripts = iter([[Sampled([50, 51], ended=True), Sampled([50, 51], ended=True), Sampled([9] * 24, looped=True)]])
    fallback = iter(range(60, 400))

    def scripted(_model: Any, prompts: Any, *_args: Any, **_options: Any) -> list[Sampled]:
        first = next(scripts, [])
        return first + [Sampled([next(fallback), 70], ended=True) for _ in range(len(prompts) - len(first))]

    monkeypatch.setattr(Writer, "sample", scripted)
    stats = make(tiny(), tmp_path / "out", settings(rows=6))
    assert stats["dropped"]["duplicate"] >= 1 and stats["dropped"]["repetitive"] == 1 and stats["rows"] == 6


def test_too_few_rows_are_refused(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.data.sampling import Sampled

    monkeypatch.setattr(
        Writer, "sample", lambda _w, prompts, *_a, **_o: [Sampled([9] * 24, looped=True) for _ in prompts]
    )
    with pytest.raises(UserError, match=r"only 0 of \d+ generated rows are usable .*raise data\.temperature"):
        make(tiny(), tmp_path / "out", settings())


def test_more_tokens_than_the_model_has_positions(tiny: Callable[..., Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    stats = make(tiny(max_positions=16), tmp_path / "out", settings(tokens=40))
    assert stats["rows"] == 12
