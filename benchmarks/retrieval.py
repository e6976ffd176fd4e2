"""The table of docs/research/retaining.md: what is found again in long prompts, policy by policy, at equal budget.

    python benchmarks/retrieval.py --checkpoint runs/x/retain-0a1b2c/model --text wikitext2_valid.txt
        [--lengths 2048,4096,8192] [--fractions 2,4,8,16] [--rows 10] [--tasks passkey,keys,continuation]
        [--policies full,retaining,recent,snapkv,random,oracle] [--positions true] [--out build/retrieval]

Numbers are hidden among made-up sentences; the text is only continued. A fraction of 8 is a budget of an eighth of the
prompt's tokens per block and KV head, the same for every policy; the last tokens of the prompt come on top. Each
measurement is kept in OUT as soon as it is made, so a run that was stopped goes on, and one with more rows
or policies adds to it; the table goes to OUT/table.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.cli.progress import ConsoleProgress
from compress.core.stage import Context
from compress.evaluation.config import RetrievalConfig
from compress.evaluation.retrieval import Measured, Retrieval, summarised
from compress.evaluation.statistics import wilson
from compress.modeling.load import load_model, load_tokenizer, resolve
from rich.console import Console

TASKS = {
    "passkey": "One number in the text, found (%, with its 95 % interval); nats per token of the true answer",
    "keys": "A number at each depth, found (%, with its 95 % interval); nats per token of the true answer",
    "continuation": "Perplexity of what follows",
}


def table(measured: Sequence[Measured], lengths: Sequence[int], fractions: Sequence[int]) -> str:
    """Markdown: per task a line for each policy and length, a column for each fraction of the context that is kept."""
    parts = []
    for task, title in TASKS.items():
        found = [one for one in measured if one.task == task]
        if not found:
            continue
        parts += [f"## {title}\n", "| policy | context | " + " | ".join(f"1/{f}" for f in fractions) + " |"]
        parts.append("|---" * (2 + len(fractions)) + "|")
        for length in lengths:
            for policy in dict.fromkeys(one.policy for one in found):
                own = [one for one in found if one.length == length and one.policy == policy]
                if policy == "full":
                    cells = [f"all: {_written(own)}", *[""] * (len(fractions) - 1)]
                else:
                    cells = [_written([one for one in own if one.budget == 1 / f]) for f in fractions]
                parts.append(f"| {policy} | {length} | " + " | ".join(cells) + " |")
        parts.append("")
    return "\n".join(parts)


def _written(measured: Sequence[Measured]) -> str:
    if not measured:
        return ""
    if measured[0].task == "continuation":
        return f"{summarised(measured)[0].value:.3g}"
    hits = [hit for one in measured for hit in one.hits]
    low, high = wilson(sum(hits), len(hits))
    nats = sum(sum(one.nll) for one in measured) / sum(sum(one.tokens) for one in measured)
    return f"{100 * sum(hits) / len(hits):.0f} ({100 * low:.0f}–{100 * high:.0f}; n {len(hits)}); {nats:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="with heads, where the policy retaining is asked for")
    parser.add_argument("--text", type=Path, help="to continue")
    parser.add_argument("--hide-in-text", action="store_true", help="hide the numbers in the text, too")
    parser.add_argument("--lengths", default="2048,4096,8192")
    parser.add_argument("--fractions", default="2,4,8,16", help="of the context that is kept: 8 is an eighth")
    parser.add_argument("--depths", default="0.1,0.3,0.5,0.7,0.9")
    parser.add_argument("--rows", type=int, default=10, help="texts per length; of passkey per length and depth")
    parser.add_argument("--policies", default="full,retaining,recent,snapkv,random,oracle")
    parser.add_argument("--tasks", default="passkey,keys,continuation")
    parser.add_argument("--positions", default="true", choices=("true", "contiguous"))
    parser.add_argument("--continued", type=int, default=128, help="tokens of a continuation")
    for name in ("chunk", "stabilizers", "local"):
        parser.add_argument(f"--{name}", type=int, help="none: as the heads were meant")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=Path("build/retrieval"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    progress = ConsoleProgress(Console())
    lengths, fractions = (
        [int(part) for part in text.split(",")] for text in (options.lengths, options.fractions)
    )  # fmt: skip
    folder = resolve(options.checkpoint, options.out / "sources", progress=progress)
    context = Context(device=options.device, dtype=options.dtype, progress=progress)
    tokenizer, model = load_tokenizer(folder), load_model(folder, options.dtype, options.device)
    asked = options.tasks.split(",")
    if "continuation" in asked and options.text is None:
        raise SystemExit("the task continuation needs a --text")
    tasks = [task for task in TASKS if task in asked]  # the continuation last
    text = str(options.text.resolve()) if options.text is not None else None

    def config(tasks: list[str], text: str | None) -> RetrievalConfig:
        values: dict[str, Any] = {
            "tasks": tasks,
            "lengths": lengths,
            "depths": [float(part) for part in options.depths.split(",")],
            "policies": options.policies.split(","),
            "budgets": [1 / fraction for fraction in fractions],
            "rows": options.rows,
            "text": text,
            "continued": options.continued,
            "chunk": options.chunk,
            "stabilizers": options.stabilizers,
            "local": options.local,
            "positions": options.positions,
        }
        return RetrievalConfig.model_validate(values)

    free = {"lengths", "fractions", "rows", "policies", "tasks", "out", "device", "dtype"}  # may change from run to run
    what = {name: str(value) for name, value in vars(options).items() if name not in free}
    settings = options.out / "settings.json"
    if settings.exists() and json.loads(settings.read_text(encoding="utf-8")) != what:
        raise SystemExit(f"{options.out} holds measurements with other settings ({settings}); choose another --out")
    settings.write_text(json.dumps(what, indent=2), encoding="utf-8")
    hidden = [task for task in tasks if task != "continuation"]
    found: dict[str, list[Measured]] = {}
    for own, source in ((hidden, text if options.hide_in_text else None), (tasks[len(hidden) :], text)):
        if not own:
            continue
        name = "continuation" if own == ["continuation"] else "hidden"
        retrieval = Retrieval(config(own, source), context, tokenizer)

        def told(measured: list[Measured], name: str = name) -> None:
            found[name] = measured
            both = [one for part in found.values() for one in part]
            (options.out / "table.md").write_text(table(both, lengths, fractions), encoding="utf-8")

        with progress.bar(" and ".join(own), len(retrieval.names())) as advance:
            told(retrieval.collect(model, folder, options.out / f"{name}.json", advance, told))
    print((options.out / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
