from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from compress.core.errors import UserError
from compress.core.stage import Advance, Context, Inputs, Progress
from compress.data.config import MagpieConfig
from compress.data.drafts import normalised
from compress.data.magpie import Magpie, query
from compress.data.rows import read_rows
from compress.data.sampling import LOOP, Sampled, Sampling, choose, loops, row_seed, sample
from compress.data.stage import check, run
from compress.data.writing import Writer
from compress.modeling.load import load_model, load_tokenizer
from compress.modeling.random import build_tokenizer

# The random model's likeliest first word is the end of the turn: draw answers as it would, not cooler.
TINY: dict[str, Any] = {"source": "magpie", "answer_temperature": 1.0, "answer_top_p": 1.0, "max_attempts": 20}


def slow_choice(logits: list[float], uniform: float, how: Sampling) -> int:
    """Sort everything, cut, renormalise, walk."""
    probabilities = (torch.tensor(logits, dtype=torch.float64) / how.temperature).softmax(-1).tolist()
    order = sorted(range(len(logits)), key=lambda token: -probabilities[token])
    if how.top_k:
        order = order[: how.top_k]
    total = sum(probabilities[token] for token in order)
    kept, mass = [], 0.0
    for token in order:
        if mass / total >= how.top_p:
            break
        kept.append(token)
        mass += probabilities[token]
    if how.top_p == 1 and not how.top_k:
        kept.sort()  # without a cut the walk goes by token number
    walked = 0.0
    for token in kept:
        walked += probabilities[token]
        if walked > uniform * mass:
            return token
    return kept[-1]


@pytest.mark.parametrize(
    "how",
    [
        Sampling(1),
        Sampling(1, temperature=0.5),
        Sampling(1, top_p=0.8),
        Sampling(1, top_p=0.999),
        Sampling(1, top_k=7),
        Sampling(1, temperature=1.5, top_k=20, top_p=0.6),
    ],
)
def test_choose_matches_a_slow_walk(how: Sampling) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(64, 900, generator=generator, dtype=torch.float64)
    uniforms = torch.rand(64, generator=generator, dtype=torch.float64)
    expected = [slow_choice(row, u, how) for row, u in zip(logits.tolist(), uniforms.tolist(), strict=True)]
    assert choose(logits, uniforms, how).tolist() == expected
    assert len(set(expected)) > 5
    assert torch.equal(choose(logits, uniforms, Sampling(1, temperature=0)), logits.argmax(-1))


def test_choose_draws_from_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0, 0.5, -torch.inf]])
    uniforms = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    drawn = choose(logits.expand(20000, -1), uniforms, Sampling(1))
    shares = torch.bincount(drawn, minlength=5) / 20000
    torch.testing.assert_close(shares.double(), logits[0].double().softmax(-1), atol=1e-4, rtol=0)


def naive(model: Any, prompt: list[int], seed: int, how: Sampling, stop: set[int], banned: list[int]) -> list[int]:
    """One row, no cache, no padding: the whole text through the model for every token."""
    uniforms = torch.rand(how.max_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    tokens: list[int] = []
    for step in range(how.max_tokens):
        logits = model(torch.tensor([prompt + tokens]), use_cache=False).logits[:, -1]
        logits[:, banned] = -torch.inf
        token = int(choose(logits, uniforms[step : step + 1], how))
        if token in stop:
            break
        tokens.append(token)
    return tokens


@pytest.mark.parametrize(
    ("family", "options"), [("llama", {}), ("gemma3_text", {"sliding_window": 8}), ("mistral", {"sliding_window": 36})]
)
def test_batched_sampling_equals_rows_on_their_own(
    tiny: Callable[..., Path], family: str, options: dict[str, Any]
) -> None:
    model = load_model(tiny(family, **options)).double()  # exact enough that no draw falls between two tokens
    draw = torch.Generator().manual_seed(1)
    head = [1, 40, 41]
    prompts = [head + torch.randint(3, 300, (n,), generator=draw).tolist() for n in (1, 9, 4, 30, 2, 17, 4, 1)]
    seeds = [row_seed(5, row, "test") for row in range(len(prompts))]
    how = Sampling(40, temperature=0.9, top_p=0.95)
    found = sample(model, prompts, seeds, how, stop={2}, banned=[0, 1])
    with torch.no_grad():
        expected = [naive(model, p, s, how, {2}, [0, 1]) for p, s in zip(prompts, seeds, strict=True)]
    assert [row.tokens for row in found] == expected
    lengths = {len(tokens) for tokens in expected}
    assert len(lengths) > 3 and min(lengths) < 20  # rows end at different times, so the batch was compacted
    assert [row.ended for row in found] == [len(tokens) < 40 for tokens in expected]
    alone = sample(model, prompts[3:4], seeds[3:4], how, stop={2}, banned=[0, 1])
    assert alone[0].tokens == found[3].tokens
    same = sample(model, [head] * 5, seeds[:5], how, stop={2})
    with torch.no_grad():
        assert [row.tokens for row in same] == [naive(model, head, s, how, {2}, []) for s in seeds[:5]]


def test_loops_are_seen() -> None:
    assert loops([5] * LOOP) and loops([9, 9, 9] + [1, 2, 3] * 20) and loops(list(range(16)) * 2)
    assert not loops([5] * (LOOP - 1)) and not loops(list(range(17)) * 3) and not loops([5] * (LOOP - 1) + [6])


def test_query_is_read_off_the_template(tiny: Callable[..., Path]) -> None:
    tokenizer, base = build_tokenizer(), tiny()
    found = query(tokenizer, base)
    assert found.before == "<|im_start|>user\n" and found.closing == "" and found.stop == {2} and found.banned == [0, 1]
    about = query(tokenizer, base, "tides")
    assert about.before.endswith("asks about tides.<|im_end|>\n<|im_start|>user\n")
    tokenizer.chat_template = "{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endfor %}"
    found = query(tokenizer, base)
    assert found.before == "[INST]" and found.closing == "[/INST]" and found.stop == {2}
    tokenizer.chat_template = "{{ messages | length }}"
    with pytest.raises(UserError, match="does not render the user's message once"):
        query(tokenizer, base)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        query(tokenizer, base)


def test_normalised_prompts() -> None:
    assert normalised("What's  up?") == normalised("what s up") and normalised("!?") == "!?" and normalised(" ") == ""


class Interrupted(Exception):
    pass


class Stops(Progress):
    """Raises from the progress callback, the way Ctrl-C would, at its `at`-th report."""

    def __init__(self, at: int):
        self.left = at

    @contextmanager
    def bar(self, label: str, total: int | None = None) -> Iterator[Advance]:
        def advance(n: int = 1, note: str = "") -> None:
            self.left -= 1
            if self.left < 0:
                raise Interrupted

        yield advance


def artifact(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def test_an_interrupted_run_ends_with_the_same_bytes(tiny: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny()
    config = MagpieConfig(**TINY, rows=20, batch=6, max_tokens=24, topics=["sound", "water"])
    inputs = Inputs(base, base)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    whole.mkdir()
    resumed.mkdir()
    check(config, base, Context(seed=3))
    metrics = run(config, inputs, whole, Context(seed=3))
    batches = len(list((whole / ".work/parts").iterdir()))
    assert batches >= 4
    for attempt in range(3):
        with pytest.raises(Interrupted):
            run(config, inputs, resumed, Context(seed=3, progress=Stops(attempt)))
        assert not (resumed / "rows.parquet").exists()
    (resumed / ".work/parts/00003.tmp").write_text("half a batch")
    run(config, inputs, resumed, Context(seed=3))
    assert artifact(resumed) == artifact(whole)
    assert set(artifact(whole)) == {"rows.parquet", "stats.json"}
    rows = read_rows(whole)
    assert len(rows) == 20 == metrics["rows"] and metrics["tokens_per_second"] > 0
    assert {row.split for row in rows} == {"train", "heldout"}
    assert all(row.messages and [m["role"] for m in row.messages] == ["user", "assistant"] for row in rows)
    assert all(row.seed == row_seed(3, row.id, "prompt") and row.targets > 0 for row in rows)
    other = tmp_path / "other"
    other.mkdir()
    run(config, inputs, other, Context(seed=4))
    assert artifact(other) != artifact(whole)


Script = list[tuple[str, Sampled | None]]


def scripted(monkeypatch: pytest.MonkeyPatch, tokenizer: Any, prompts: list[Any], answers: dict[str, Any]) -> None:
    """Replaces sampling: prompts come in order; an answer goes by its prompt."""
    left = iter(prompts)

    def fake(_: Writer, texts: list[list[int]], seeds: Any, how: Sampling, **__: Any) -> list[Sampled]:
        if how.temperature == 1.0:
            return [next(left) for _ in texts]
        asked = [tokenizer.decode(ids).split("user\n")[1].split("<|im_end|>")[0] for ids in texts]
        return [answers[prompt] for prompt in asked]

    monkeypatch.setattr(Writer, "sample", fake)


def test_rows_are_dropped_and_counted_by_reason(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(tiny())

    def says(text: str, ended: bool = True, looped: bool = False) -> Sampled:
        return Sampled(tokenizer(text)["input_ids"], ended, looped)

    good = says("it is so")
    prompts = [says("One?"), says("  "), says("one"), says("Long one", ended=False), says("Loop", False, True)]
    prompts += [says("Two"), says("Three"), says("Four"), says("Five"), says("Six"), says("two!"), says("Seven")]
    answers = {"One?": good, "Two": says("and", ended=False), "Three": says(" \n"), "Four": says("x", False, True)}
    answers |= {"Five": says("word " * 60), "Six": good, "two!": good, "Seven": good}
    scripted(monkeypatch, tokenizer, prompts, answers)
    config = MagpieConfig(source="magpie", rows=3, batch=4, length=60, max_attempts=4)
    metrics = run(config, Inputs(tiny(), tiny()), tmp_path, Context())
    assert metrics["dropped"] == {
        "duplicate": 2,
        "empty": 2,
        "long_prompt": 1,
        "repetitive": 2,
        "too_long": 1,
        "unfinished": 1,
    }
    assert metrics["seen"] == 12 and metrics["kept_share"] == 0.25 and metrics["cut"] == 0
    rows = read_rows(tmp_path)
    assert [row.messages[0]["content"] for row in rows if row.messages] == ["One?", "Six", "Seven"]
    assert json.loads((tmp_path / "stats.json").read_text())["dropped"] == metrics["dropped"]


def test_unfinished_answers_can_be_kept(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(tiny())
    cut, whole = (Sampled(tokenizer("it was")["input_ids"], ended) for ended in (False, True))
    prompts = [Sampled(tokenizer(text)["input_ids"], True) for text in ("One", "Two")]
    scripted(monkeypatch, tokenizer, prompts, {"One": cut, "Two": whole})
    config = MagpieConfig(source="magpie", rows=2, batch=2, unfinished="keep")
    assert run(config, Inputs(tiny(), tiny()), tmp_path, Context())["cut"] == 1
    first, second = read_rows(tmp_path)
    assert first.cut and not second.cut and first.messages and second.messages
    assert second.targets == first.targets + 1 and second.tokens == first.tokens + 2  # the end of the turn, a newline


def test_too_few_rows(
    noted: Callable[[], Any], tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(tiny())
    ask = Sampled(tokenizer("Same")["input_ids"], True)
    scripted(monkeypatch, tokenizer, [ask] * 1000, {"Same": ask})
    with pytest.raises(UserError, match=r"only 1 of 12 generated rows are usable \(11 duplicate\)"):
        run(MagpieConfig(source="magpie", rows=4, batch=4, max_attempts=3), Inputs(tiny(), tiny()), tmp_path, Context())
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    prompts = [Sampled(tokenizer(f"Say {i % 5}")["input_ids"], True) for i in range(100)]
    scripted(monkeypatch, tokenizer, prompts, {f"Say {i}": ask for i in range(5)})
    config, progress = MagpieConfig(source="magpie", rows=10, batch=4, max_attempts=2), noted()
    assert run(config, Inputs(tiny(), tiny()), fresh, Context(progress=progress))["rows"] == 5
    assert progress.texts[0] == "5 rows instead of 10 after data.max_attempts (15 duplicate)"


def test_a_text_that_closes_the_turn_ends_the_prompt(tiny: Callable[..., Path]) -> None:
    """A template without an end-of-turn token (as Mistral's): the prompt ends where the model writes [/INST]."""
    tokenizer = load_tokenizer(tiny())
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}"
        "{{ ' ' + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    )
    asked = query(tokenizer, tiny())
    drawer = Magpie.__new__(Magpie)
    drawer.tokenizer = tokenizer
    watch = drawer._watch(asked.closing)
    assert watch is not None
    tokens = tokenizer("what [/INST] more")["input_ids"]
    ends = [tokenizer.decode(tokens[:n]) for n in range(1, len(tokens) + 1) if watch(tokens[:n])]
    assert ends == ["what [/INST]"]


def test_batches_do_not_share_random_numbers() -> None:
    seeds = {row_seed(seed, row, phase) for seed in range(3) for row in range(500) for phase in ("prompt", "answer")}
    assert len(seeds) == 3000
