"""Bundles at run time: text in, text out, at every depth, in both engines, without torch."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from compress.core.errors import UserError
from compress.modeling.blocks import drop_blocks
from compress.modeling.load import load_model, load_tokenizer
from compress.runtime.block_chain import BlockChain, CachedText
from compress.runtime.bundle import read_bundle
from compress.runtime.generator import Request, RequestWork
from compress.runtime.onnx_engine import OnnxEngine
from compress.runtime.session import Session, Settings, depth_artifacts
from compress.runtime.text import Tokenizer

ENGINES = ("onnx", "llama.cpp")
IDS = [(37 * i) % 440 + 3 for i in range(60)]
DEPTHS = (2, 3, 4)
TALK = [
    {"role": "system", "content": "the way of many people"},
    {"role": "user", "content": "what would you say, été 42?"},
    {"role": "assistant", "content": "look so and 日本"},
    {"role": "user", "content": "which time is it"},
]


def check_greedy(checkpoint: Path, depth: int, ids: list[int], made: list[int], engine: str) -> None:
    """Every token of `made` is what torch, reading the whole text in the first `depth` blocks, finds likeliest.

    llama.cpp holds weights, keys and values in float16: there another token may be ahead by a hair.
    """
    model = load_model(checkpoint)
    drop_blocks(model, list(range(depth, len(model.model.layers))))
    with torch.no_grad():
        rows = model(torch.tensor([ids + made])).logits[0, len(ids) - 1 : -1]
    behind = rows.max(-1).values - rows.gather(-1, torch.tensor(made)[:, None])[:, 0]
    assert float(behind.max()) <= (0.05 if engine == "llama.cpp" else 1e-4)


def onnx_folder(bundle: Path, depth: int = 4) -> Path:
    return bundle / depth_artifacts(read_bundle(bundle), "onnx", "fp32")[depth].path


def text_of(session: Session, settings: Settings, messages=TALK) -> str:
    return "".join(piece.text for piece in session.chat(messages, settings))


@pytest.fixture(scope="module")
def checkpoint(shaken) -> Path:
    """What `bundle` was made from: weights so large that depths often disagree."""
    return shaken(initializer_range=0.3)


@pytest.fixture(params=ENGINES)
def session(request, bundle):
    with Session(bundle, request.param, threads=1, context=256) as opened:
        yield opened


@pytest.fixture
def onnx(bundle):
    with Session(bundle, "onnx", threads=1) as opened:
        yield opened


def write(session: Session, ids, count: int, depth: int = 4, work: RequestWork | None = None, **options) -> list[int]:
    return list(session.tokens(Request(ids, count, depth, **options), work or RequestWork()))


@pytest.mark.parametrize("depth", DEPTHS)
def test_greedy_text_is_torchs_at_every_depth(session, checkpoint, depth):
    made = write(session, IDS[:20], 24, depth)
    assert len(made) == 24 and len(set(made)) > 10
    check_greedy(checkpoint, depth, IDS[:20], made, session.engine)


def test_depth_switches_between_requests(session, checkpoint):
    """In one process and one text: each request goes on from where another depth stopped."""
    ids = IDS[:10]
    for depth in (2, 4, 3, 2, 4):
        made = write(session, ids, 5, depth)
        check_greedy(checkpoint, depth, ids, made, session.engine)
        ids = ids + made


@pytest.mark.parametrize("depth", DEPTHS)
def test_one_set_of_weights_gives_each_depths_own_graph(bundle, depth):
    with OnnxEngine(onnx_folder(bundle, depth), 1) as engine:
        expected, _ = engine.logits(IDS)
    text = CachedText(BlockChain(onnx_folder(bundle), DEPTHS, 1))
    text.add(IDS)
    np.testing.assert_allclose(text.logits(depth, 60), expected, atol=2e-5)


@pytest.mark.parametrize("seed", range(3))
def test_lazily_read_blocks_have_the_keys_and_values_of_a_whole_pass(bundle, seed):
    chain = BlockChain(onnx_folder(bundle), DEPTHS, 1)
    whole, lazy, random = CachedText(chain), CachedText(chain), np.random.default_rng(seed)
    whole.add(IDS)
    expected = whole.logits(4, 60)
    for token in IDS:
        lazy.add([token])
        if random.random() < 0.5:
            lazy.logits(int(random.choice(DEPTHS)))
        if random.random() < 0.1:
            length = len(lazy.tokens)
            lazy.cut(length - 1)
            lazy.add([token])
    np.testing.assert_array_equal(lazy.logits(4, 5), expected[-5:])
    for mine, theirs in zip(lazy._caches, whole._caches, strict=True):
        np.testing.assert_array_equal(mine[:, :, :60], theirs[:, :, :60])


def test_the_cache_grows_and_ends_with_the_context(onnx, checkpoint):
    assert onnx.context == 511
    ids = [(11 * i) % 440 + 3 for i in range(250)]
    check_greedy(checkpoint, 4, ids, write(onnx, ids, 12), "onnx")  # past the first 256
    ids = [(11 * i) % 440 + 3 for i in range(510)]
    assert len(write(onnx, ids, 100)) == 2


def test_the_template_is_transformers(session, checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    expected = tokenizer.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)
    assert session.prompt(TALK) == list(expected)


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}{% for m in messages %}{{ m | tojson }}{{ '<' }}{% endfor %}{{ eos_token }}",
        "{%- for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}\n  {{ m.content }}\n  {% endfor %} x",
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}{% if tools %}tools{% endif %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"
        "{{ strftime_now('%Y-%m') }}",
    ],
)
def test_templates_render_as_in_transformers(bundle, tmp_path, template):
    from compress.runtime.chat import ChatTemplate

    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundle / name, tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    for answer in (True, False):
        expected = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=answer)
        assert ChatTemplate(tmp_path).render(TALK, answer=answer) == expected


def test_templates_that_refuse_or_are_not_there(bundle, tmp_path):
    from compress.runtime.chat import ChatTemplate

    with pytest.raises(UserError, match="has no chat template"):
        ChatTemplate(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('alternate, please') }}", encoding="utf-8")
    with pytest.raises(UserError, match=r"refuses a conversation with the turns system, user, .*alternate, please"):
        ChatTemplate(tmp_path).render(TALK)
    (tmp_path / "chat_template.jinja").write_text("{% for %}", encoding="utf-8")
    with pytest.raises(UserError, match="is broken"):
        ChatTemplate(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}", encoding="utf-8")
    with pytest.raises(UserError, match="unsafe"):
        ChatTemplate(tmp_path).render(TALK)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("chat_template.jinja", b"\xff{{ messages }}", "chat_template.jinja is not UTF-8 text"),
        ("tokenizer_config.json", b'{"chat_template": ', "tokenizer_config.json is not valid JSON"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "tool", "template": "T"}]}', "none called default"),
    ],
)
def test_damaged_templates_are_told(tmp_path, file, content, message):
    from compress.runtime.chat import ChatTemplate

    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=message):
        ChatTemplate(tmp_path)


def test_a_template_in_its_old_place_is_read(tmp_path):
    from compress.runtime.chat import ChatTemplate

    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages[0].content }}"}))
    assert ChatTemplate(tmp_path).render(TALK) == TALK[0]["content"]


def test_pieces_are_whole_characters(bundle):
    from compress.runtime.text import TextStream

    tokenizer, random = Tokenizer(bundle), np.random.default_rng(0)
    texts = ["naïve 日本語 🙂👩‍👩‍👧 end", "🙂" * 40, "x\ufffdy", "é"]
    for ids in [tokenizer.encode(text) for text in texts] + [random.integers(0, 451, 200).tolist() for _ in range(5)]:
        stream, pieces = TextStream(tokenizer), []
        for token in ids:
            pieces.append(stream.push(token))
        assert "".join(pieces) + stream.rest() == tokenizer.decode(ids)
    stream = TextStream(tokenizer)
    shown = [stream.push(token) for token in tokenizer.encode("a🙂b")]
    assert "".join(shown) == "a🙂b" and not any("\ufffd" in piece for piece in shown)
    assert len([piece for piece in shown if piece]) == 3 and len(shown) > 4


def test_stop_tokens_finish_and_usage(session, bundle, tmp_path):
    settings = Settings(max_tokens=6)
    *pieces, last = session.complete("the way of", settings)
    assert all(piece.finish is None and piece.usage is None for piece in pieces)
    assert last.finish == "length" and last.usage is not None
    prompt = session.tokenizer.encode("the way of", begin=True)
    made = write(session, prompt, 6)
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (len(prompt), 6)
    assert "".join(p.text for p in [*pieces, last]) == session.tokenizer.decode(made)
    other = tmp_path / "other"
    shutil.copytree(bundle, other)
    replace(other, "generation_config.json", json.dumps({"eos_token_id": [450, made[3]]}).encode())
    with Session(other, session.engine, threads=1, context=256) as stopped:
        *pieces, last = stopped.complete("the way of", settings)
    where = made.index(made[3])
    assert last.finish == "stop" and last.usage is not None and last.usage.completion_tokens == where
    assert "".join(p.text for p in [*pieces, last]) == session.tokenizer.decode(made[:where])


def replace(bundle: Path, name: str, content: bytes) -> None:
    """Put another file into a bundle, as if it had been made with it."""
    (bundle / name).unlink()
    (bundle / name).write_bytes(content)
    manifest = json.loads((bundle / "manifest.json").read_text())
    for entry in manifest["files"]:
        if entry["path"] == name:
            entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def test_what_was_said_is_not_read_again(session):
    messages = [{"role": "user", "content": "what is the way"}]
    settings = Settings(max_tokens=8)
    *_, first = session.chat(messages, settings)
    said = text_of(session, settings, messages)
    longer = [*messages, {"role": "assistant", "content": said}, {"role": "user", "content": "and so"}]
    pieces = list(session.chat(longer, settings))
    assert first.usage.reused_tokens == 0
    assert pieces[-1].usage.reused_tokens >= first.usage.prompt_tokens - 1
    with Session(session.path, session.engine, threads=1, context=256) as fresh:
        assert text_of(fresh, settings, longer) == "".join(piece.text for piece in pieces)


def test_sampling_follows_seed_and_top_p(session):
    def sample(seed: int, top_p: float = 1.0) -> list[int]:
        return write(session, IDS[:9], 10, temperature=1.5, seed=seed, top_p=top_p)

    assert sample(1) == sample(1)
    assert len({tuple(sample(seed)) for seed in range(4)}) == 4
    assert sample(1, 1e-6) == write(session, IDS[:9], 10)


@pytest.mark.parametrize("draft_tokens", [1, 2, 4, 7])
@pytest.mark.parametrize("draft_depth", [2, 3])
def test_drafts_change_nothing(onnx, draft_depth, draft_tokens):
    total = RequestWork()
    for start in range(4):
        ids = IDS[start : start + 8]
        for count in (1, 2, 17):
            work = RequestWork()
            options = {"draft_depth": draft_depth, "draft_tokens": draft_tokens}
            assert write(onnx, ids, count, 4, work, **options) == write(onnx, ids, count)
            assert work.depths == {4: count} and work.accepted <= work.drafted
            total.drafted, total.accepted = total.drafted + work.drafted, total.accepted + work.accepted
    assert 0 < total.accepted < total.drafted


@pytest.mark.parametrize("seed", range(4))
def test_drafts_change_nothing_where_tokens_are_drawn(onnx, seed):
    options = {"temperature": 0.8, "top_p": 0.9, "seed": seed}
    assert write(onnx, IDS[:9], 30, draft_depth=2, **options) == write(onnx, IDS[:9], 30, **options)


def test_another_bundle_drafts(bundle, onnx):
    with Session(bundle, "onnx", threads=1, draft=bundle) as drafted:
        work = RequestWork()
        assert write(drafted, IDS[:9], 30, 4, work) == write(onnx, IDS[:9], 30)
        assert work.drafted == work.accepted > 0  # it drafts for itself
        assert write(drafted, IDS[3:9], 20, 3) == write(onnx, IDS[3:9], 20, 3)


def test_llama_cpp_drafts_by_itself(bundle):
    with Session(bundle, "llama.cpp", threads=1, context=256) as session:
        work = RequestWork()
        assert write(session, IDS[:9], 30, 4, work, draft_depth=3) == write(session, IDS[:9], 30)
        assert 0 < work.accepted <= work.drafted


def test_early_exit(onnx, checkpoint):
    ids, never, always = IDS[:9], {2: 1.0, 3: 1.0}, {2: 0.0, 3: 0.0}
    work = RequestWork()
    assert write(onnx, ids, 30, 4, work, exits=never) == write(onnx, ids, 30) and work.depths == {4: 30}
    work = RequestWork()
    assert write(onnx, ids, 30, 4, work, exits=always) == write(onnx, ids, 30, 2) and work.depths == {2: 30}
    work, thresholds = RequestWork(), {2: 0.2, 3: 0.2}
    made = write(onnx, ids, 40, 4, work, exits=thresholds)
    assert len(work.depths) == 3 and sum(work.depths.values()) == 40
    models = {depth: load_model(checkpoint) for depth in DEPTHS}
    for depth, model in models.items():
        drop_blocks(model, list(range(depth, 4)))
    tokens = list(ids)
    for token in made:  # every depth reads the whole text anew, as if no token had skipped a block
        with torch.no_grad():
            rows = {d: torch.softmax(m(torch.tensor([tokens])).logits[0, -1], -1) for d, m in models.items()}
        depth = next((d for d in (2, 3) if float(rows[d].max()) > thresholds[d]), 4)
        assert token == int(rows[depth].argmax())
        tokens.append(token)


def test_wrong_requests_are_named(bundle, session, tmp_path):
    with pytest.raises(UserError, match="there is no depth 7 here; there are: 2, 3, 4"):
        session.chat(TALK, Settings(depth=7))
    with pytest.raises(UserError, match="draft depth 4 must be less than depth 4"):
        session.chat(TALK, Settings(draft_depth=4))
    with pytest.raises(UserError, match="the prompt is empty"):
        session.complete("", Settings())
    with pytest.raises(UserError, match=r"the prompt has \d+ tokens, the context has room for"):
        session.complete("way " * 600, Settings())
    with pytest.raises(UserError, match="at least one message"):
        session.chat([], Settings())
    with pytest.raises(UserError, match="drafting and early exit cannot be combined"):
        session.chat(TALK, Settings(draft_depth=2, exits={2: 0.5}))
    with pytest.raises(UserError, match="must be between 0 and 1, not 3"):
        session.chat(TALK, Settings(exits={2: 3}))
    with pytest.raises(UserError, match="temperature must be at least 0, not -1"):
        Settings(temperature=-1)
    if session.engine == "llama.cpp":
        with pytest.raises(UserError, match=r"llama\.cpp has no early exit"):
            list(session.chat(TALK, Settings(exits={2: 0.5})))


def test_wrong_bundles_are_named(bundle, tmp_path):
    with pytest.raises(UserError, match=r"no engine 'torch'; there are: onnx, llama\.cpp"):
        Session(bundle, "torch")
    with pytest.raises(UserError, match=r"has no artifact for onnx F16; it has: onnx fp32, llama.cpp F16"):
        Session(bundle, "onnx", "F16")
    with pytest.raises(UserError, match="no depth 5 here"):
        Session(bundle, "onnx", deepest=5)
    with pytest.raises(UserError, match=r"is not a bundle: it has no manifest\.json"):
        Session(tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(bundle, broken)
    graph = onnx_folder(broken) / "model.onnx"
    size = graph.stat().st_size
    graph.unlink()
    with pytest.raises(UserError, match=r"lacks onnx/fp32/.*model\.onnx"):
        Session(broken, "onnx")
    graph.write_bytes(b"\x0a" * size)
    with pytest.raises(UserError, match=r"model\.onnx has changed since the bundle was made"):
        Session(broken, "onnx")
    replace(broken, str(graph.relative_to(broken)), b"\x0a" * size)
    with pytest.raises(UserError, match="is not a complete ONNX model"):
        Session(broken, "onnx")


@pytest.mark.parametrize("engine", ENGINES)
def test_leaving_depths_out_of_memory(bundle, checkpoint, engine):
    with Session(bundle, engine, threads=1, deepest=3, context=256) as session:
        assert session.depths == (2, 3)
        check_greedy(checkpoint, 3, IDS[:9], write(session, IDS[:9], 8, 3), engine)
