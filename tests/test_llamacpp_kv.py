"""A KV cache of bounded size in llama.cpp, against the torch model and a slow account of what is evicted.

Its ggml may not meet libggml-python's in a process, which quantizing loads; so what opens it runs in one of its own,
and this one compares. All families share that process: it takes longer to start than to run.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from compress.errors import UserError
from compress.export.gguf import write_gguf
from compress.modeling.blocks import AttentionShape, Decoder
from compress.modeling.load import load_model
from compress.modeling.retaining import RetainingHeads
from compress.runtime import llama_library
from compress.runtime.llamacpp_kv import heads_budget, read_heads
from compress.runtime.token_eviction import HeldTokens, TokenBudget

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3_text")
LIMITS = {"budget": 12, "chunk": 7, "stabilizers": 3, "local": 5}
WIDTH, NEW = 8, 12
PROMPT = [(37 * i) % 251 + 5 for i in range(60)]


def write_heads(heads: RetainingHeads, file: Path, **settings: int) -> None:
    """The sidecar as export writes it."""
    writer = gguf.GGUFWriter(file, "compress-retain")
    for name, value in settings.items():
        writer.add_uint32(f"compress.retain.{name}", value)
    for number, block in enumerate(heads.blocks):
        for layer, weight in ((1, block.w1.weight), (2, block.w2.weight)):
            writer.add_tensor(f"blk.{number}.retain_{layer}.weight", weight.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_heads(config: Any) -> RetainingHeads:
    torch.manual_seed(5)
    heads = RetainingHeads(config.num_hidden_layers, AttentionShape.of(config), WIDTH)
    for parameter in heads.parameters():
        parameter.data = torch.randn(parameter.shape) * 1.5  # so that scores differ by much
    return heads


WORKER = """
import json, sys
import numpy as np
from pathlib import Path
from compress.runtime.generator import Request, Work
from compress.runtime.llamacpp_kv import LlamaCppKvGenerator, BoundedText
from compress.runtime.token_eviction import TokenBudget

jobs = json.load(open(sys.argv[1]))
for job in jobs:
    limits = TokenBudget(**job["limits"])
    kv = LlamaCppKvGenerator({job["depth"]: Path(job["model"])}, Path(job["heads"]), limits, threads=1)
    cache, scorer = kv._empty_cache(job["depth"], limits.most(len(job["prompt"]), job["new"]))
    seen, rows, most, held = [], [], 0, []
    take, decode = scorer.take, cache.decode
    def spy_take():
        scores = take()
        seen.append(scores)
        return scores
    def spy_decode(ids, first):
        global most
        held.append(text.held.positions.tolist())
        most = max(most, len(text.held) + len(ids))
        return decode(ids, first)
    scorer.take, cache.decode = spy_take, spy_decode
    text = BoundedText(cache, scorer, limits)
    rows.append(text.read_prompt(job["prompt"]))
    for token in job["forced"]:
        rows.append(text.read_one(token))
    scorer.take, cache.decode = take, decode
    request = Request(job["prompt"], job["new"], job["depth"])
    work = Work()
    tokens = [list(kv.generate(request, work)) for _ in range(2)]
    assert tokens[0] == tokens[1], "a second text in the same cache comes out otherwise"
    np.savez(job["out"], scores=np.concatenate(seen), logits=np.stack(rows), tokens=tokens[0], most=most,
             cells=cache.cells, held=json.dumps(held))
    kv.close()
"""


def in_own_process(jobs: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    for number, job in enumerate(jobs):
        job["out"] = str(folder / f"out{number}.npz")
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(folder / "jobs.json")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return [dict(np.load(job["out"])) for job in jobs]


FORCED = [11, 190, 33, 7, 120, 64, 9, 201, 77, 15]
CASES = {
    "evicting": {**LIMITS},
    "while decoding": {**LIMITS, "while_decoding": True},
    "roomy": {**LIMITS, "budget": 100},
}


@pytest.fixture(scope="module")
def runs(shaken, tmp_path_factory) -> dict[tuple[str, str], dict[str, Any]]:
    """Every family in every case."""
    folder = tmp_path_factory.mktemp("kv")
    jobs, keys = [], []
    for family in FAMILIES:
        checkpoint = shaken(family, initializer_range=0.2)
        model = load_model(checkpoint)
        write_gguf(checkpoint, folder / f"{family}.gguf", "F16")
        write_heads(make_heads(model.config), folder / f"{family}-heads.gguf", **LIMITS)
        for case, limits in CASES.items():
            files = {"model": str(folder / f"{family}.gguf"), "heads": str(folder / f"{family}-heads.gguf")}
            depth = model.config.num_hidden_layers
            job = {"prompt": PROMPT, "forced": FORCED, "new": NEW, "depth": depth, "limits": limits}
            jobs.append({**files, **job})
            keys.append((family, case))
    return dict(zip(keys, in_own_process(jobs, folder), strict=True))


def reference(checkpoint: Path, limits: dict[str, Any], ids: list[int], prompt: int) -> dict[str, Any]:
    """Slow and obvious: every token's queries see a set of positions; one forward pass per read over all positions,
    the dropped ones masked for the rows that come after. Rows already computed stay as they were, since every pass
    masks for each row what was dropped before it."""
    model = load_model(checkpoint)
    heads = make_heads(model.config)
    visible = torch.zeros(len(ids), len(ids), dtype=torch.bool)
    alive: list[int] = []
    scores = torch.empty(0, 0)

    def forward(end: int) -> torch.Tensor:
        nonlocal scores
        def added(seen: torch.Tensor) -> torch.Tensor:
            return torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]

        whole: Any = added(visible[:end, :end])
        if model.config.model_type == "gemma3_text":
            near = visible[:end, :end].triu(1 - model.config.sliding_window)
            whole = {"full_attention": whole, "sliding_attention": added(near)}
        with torch.no_grad(), Decoder(model).projections() as seen:
            logits = model(torch.tensor([ids[:end]]), attention_mask=whole).logits[0]
            scores = torch.cat([heads.score(n, seen[n])[0] for n in range(len(seen))], -1)
        return logits

    def read(start: int, end: int) -> None:
        for row in range(start, end):
            alive.append(row)
            visible[row, alive] = True
        forward(end)

    def evict(budget: int, newest: int) -> None:
        if len(alive) <= budget:
            return
        shares = torch.softmax(scores.double(), 0).mean(-1)  # over everything read so far
        ranked = sorted(alive[:-1], key=lambda p: (-(1e9 if p > alive[-1] - newest else shares[p]), p))
        alive[:] = sorted(ranked[: budget - 1]) + alive[-1:]

    body = max(prompt - limits["local"], 0)
    for start in range(0, body, limits["chunk"]):
        end = min(start + limits["chunk"], body)
        read(start, end)
        evict(limits["budget"], limits["stabilizers"] if end < body else 0)
    read(body, prompt)
    held = [list(alive)]
    for position in range(prompt, len(ids)):
        if limits.get("while_decoding"):
            evict(limits["budget"] + limits["local"] - 1, limits["local"])
        held.append(list(alive))
        read(position, position + 1)
    logits = forward(len(ids))
    return {"logits": logits[prompt - 1 :].numpy(), "scores": scores.numpy(), "held": held}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_with_a_bounded_cache_is_the_torch_model_without_those_tokens(runs, shaken, family, case):
    """Scores, what is held at each step, and logits."""
    found, limits = runs[family, case], CASES[case]
    expected = reference(shaken(family, initializer_range=0.2), limits, [*PROMPT, *FORCED], len(PROMPT))
    spread = expected["scores"].std()
    assert np.abs(found["scores"] - expected["scores"]).max() < 0.03 * spread
    assert json.loads(str(found["held"]))[-len(FORCED) :] == expected["held"][1:]
    assert np.abs(found["logits"] - expected["logits"]).max() < 0.02 * expected["logits"].std()
