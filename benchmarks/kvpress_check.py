"""Two policies of kv/policies against kvpress 0.5.5: which entries of a prompt each keeps.

    python -m venv build/kvpress
    build/kvpress/bin/pip install torch==2.13.0  # the CPU build will do
    build/kvpress/bin/pip install kvpress==0.5.5 "transformers==5.2.*"
    python benchmarks/kvpress_check.py ours                            [--out build/kvpress_check]
    build/kvpress/bin/python benchmarks/kvpress_check.py theirs        [--out build/kvpress_check]

kvpress wants another transformers, so each side runs in an environment of its own. A random model reads a prompt as one
chunk, without a local tail: then SnapKV is the published one. What kvpress keeps is read off the keys that are left in
its cache. The second command prints, per policy and budget, the share of entries that both keep.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

LENGTH, BUDGETS = 512, (128, 256)  # powers of 2: kvpress is told a ratio
POLICIES = ("snapkv", "recent")
FAMILIES = ("llama", "qwen3")
Kept = dict[str, list[list[list[int]]]]  # "family/policy/budget" → block → KV head → positions, ascending


def ours(out: Path) -> None:
    """Write the models, the prompt and what our cache keeps."""
    import torch
    from compress.evaluation.kv_cache import KVCache
    from compress.kv.policies import make
    from compress.kv.settings import KvBudget
    from compress.modeling.blocks import Decoder
    from compress.modeling.load import load_model
    from compress.modeling.random import random_checkpoint

    prompt = torch.randint(3, 400, (LENGTH,), generator=torch.Generator().manual_seed(0)).tolist()
    kept: Kept = {}
    for family in FAMILIES:
        folder = out / family
        if not folder.exists():
            random_checkpoint(folder, family, max_positions=2 * LENGTH, initializer_range=0.2)
        decoder = Decoder(load_model(folder))
        for policy in POLICIES:
            for budget in BUDGETS:
                settings = KvBudget(budget, chunk=LENGTH, stabilizers=0, local=0, policy=policy)
                cache = KVCache(decoder, make(settings), settings, LENGTH)
                cache.read_prompt(prompt)
                kept[f"{family}/{policy}/{budget}"] = [
                    layer.positions[:, : layer.count].tolist() for layer in cache.layers
                ]
    (out / "ours.json").write_text(json.dumps({"prompt": prompt, "kept": kept}), encoding="utf-8")


def theirs(out: Path) -> None:
    """Let kvpress read the same prompt, and print how much of what is kept agrees."""
    import torch
    from kvpress import SnapKVPress, StreamingLLMPress  # type: ignore[import-not-found]
    from transformers import AutoModelForCausalLM, DynamicCache

    found = json.loads((out / "ours.json").read_text(encoding="utf-8"))
    ids = torch.tensor([found["prompt"]])

    def keys(model: Any, press: Any) -> list[Any]:
        cache = DynamicCache()
        with torch.no_grad():
            if press is None:
                model.model(ids, past_key_values=cache)
            else:
                with press(model):
                    model.model(ids, past_key_values=cache)
        layers: list[Any] = cache.layers
        return [layer.keys[0] for layer in layers]

    for family in FAMILIES:
        model = AutoModelForCausalLM.from_pretrained(out / family, attn_implementation="sdpa").eval()
        whole = keys(model, None)
        for policy in POLICIES:
            for budget in BUDGETS:
                ratio = 1 - budget / LENGTH
                press = SnapKVPress(ratio) if policy == "snapkv" else StreamingLLMPress(ratio)
                shares = []
                pairs = zip(keys(model, press), whole, found["kept"][f"{family}/{policy}/{budget}"], strict=True)
                for left, every, own in pairs:
                    for head in range(len(left)):
                        places = torch.cdist(left[head], every[head]).argmin(1).tolist()
                        assert len(set(places)) == len(own[head]) == budget
                        shares.append(len(set(places) & set(own[head])) / budget)
                print(
                    f"{family:8} {policy:8} {budget:4} of {LENGTH}: {100 * sum(shares) / len(shares):.2f} % in common, "
                    f"{100 * min(shares):.2f} % at least in each of {len(shares)} heads"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("side", choices=("ours", "theirs"))
    parser.add_argument("--out", type=Path, default=Path("build/kvpress_check"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    (ours if options.side == "ours" else theirs)(options.out)


if __name__ == "__main__":
    main()
