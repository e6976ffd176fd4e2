"""Peak memory and speed of training with each teacher, and of TRL's trainers on the same model, rows and steps.

    python benchmarks/anchor_memory.py [--trl-python PYTHON] [--hidden H] [--blocks B] [--dropped N] [--steps S] ...

A random Llama loses some blocks and one of its projections is changed, as healing does; LoRA training in float32, one
row per step. Each case runs in a process of its own: the whole step `distill` of the Python API (loading, the look at
the held-out row, training, merging, saving), or TRL's trainer from loading to saving. Memory is the largest resident
set above the one after imports; speed is that of the median step, beside it by processor time, which other work on the
machine slows down less. TRL lives in an environment of its own, whose python is named:

    python -m venv trl && trl/bin/pip install -c constraints.txt trl peft torch

DistillationTrainer writes its completions with the student; here it is given the rows' own, so that it learns from the
same tokens as the others and generation costs it nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

OURS: dict[str, dict[str, Any]] = {
    "shared": {"teacher": "shared"},
    "copy": {"teacher": "copy"},
    "copy, nf4": {"teacher": {"kind": "copy", "quantize": "nf4"}},
    "cached": {"teacher": "cached"},
    "none (sft)": {"teacher": "copy", "objective": "sft"},
}
TRL = ("SFTTrainer", "DistillationTrainer")
WORDS = "the of and to in is that for it was on are as with his they be at one have this from or had by word".split()


class Clock:
    """Times of the ends of steps: on the wall, and of all of the process's threads together."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def tick(self) -> None:
        self.times.append((time.perf_counter(), time.process_time()))

    def seconds(self) -> dict[str, float]:
        """Of the median step; the first and the last have other work beside them."""
        return {name: self._median(number) for number, name in enumerate(("seconds", "cpu_seconds"))}

    def _median(self, number: int) -> float:
        times = [both[number] for both in self.times]
        steps = [b - a for a, b in itertools.pairwise(times)]
        return statistics.median(steps[1:-1] or steps)


def peak_mb() -> float:
    """The largest resident set so far."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return kilobytes / 1024


def prepare(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Base, student, rows and the cached teacher."""
    import random

    import torch
    from compress.core.stage import WORK, Context
    from compress.data.chat import load_encoded
    from compress.data.config import TeacherConfig
    from compress.data.rows import Row, write_rows
    from compress.data.teacher_cache import write_teacher
    from compress.modeling.blocks import Decoder, drop_blocks
    from compress.modeling.checkpoint import save_checkpoint
    from compress.modeling.load import load_model, load_tokenizer
    from compress.modeling.random import random_checkpoint
    from compress.modeling.weights import count_parameters

    base, data = folder / "base", folder / "data"
    random_checkpoint(
        base,
        vocab_size=options.vocabulary,
        blocks=options.blocks,
        hidden=options.hidden,
        heads=options.hidden // 64,
        kv_heads=options.hidden // 128,
        intermediate=options.intermediate,
        max_positions=max(512, options.tokens),
    )
    tokenizer, model = load_tokenizer(base), load_model(base)
    begin = options.blocks // 2
    linear = Decoder(model).down_proj(begin - 1)
    linear.weight.data += 0.01 * torch.randn_like(linear.weight)
    drop_blocks(model, range(begin, begin + options.dropped))
    save_checkpoint(model, tokenizer, folder / "pruned")
    (data / WORK).mkdir(parents=True)
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=options.tokens * n)) for n in (options.steps, 1)]
    rows = [Row(0, "train", text=texts[0]), Row(1, "heldout", text=texts[1])]
    write_rows(data, rows)
    started = time.perf_counter()
    write_teacher(TeacherConfig(top_k=options.top_k), base, rows, tokenizer, options.tokens, data, Context())
    windows = [window.input_ids for window in load_encoded(data, tokenizer, "train", options.tokens)]
    windows = [window for window in windows if len(window) == options.tokens][: options.steps]
    (folder / "rows.json").write_text(json.dumps(windows))
    return {
        "parameters": [count_parameters(base), count_parameters(folder / "pruned")],
        "cache_seconds": round(time.perf_counter() - started, 1),
        "cache_mb": round(sum(file.stat().st_size for file in (data / "teacher").iterdir()) / 1e6, 2),
    }


def ours(case: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """The distill stage."""
    import bitsandbytes  # noqa: F401
    import compress.distill.stage  # noqa: F401
    import peft.tuners.lora  # noqa: F401
    import torch.profiler  # noqa: F401
    from compress.api import ProgressEvent, distill
    from transformers.models.llama import modeling_llama  # noqa: F401

    clock = Clock()

    def watch(event: ProgressEvent) -> None:
        if event.label == "training":
            clock.tick()

    plain: dict[str, Any] = {
        "objective": {"kind": "kd"},
        "tune": {"kind": "lora", "rank": options.rank},
        "max_steps": options.steps,
        "accumulate": 1,
        "length": options.tokens,
        "gradient_checkpointing": options.checkpointing,
        "eval_every": 10**6,
        "save_every": 10**6,
    }
    out = folder / "".join(c for c in case if c.isalnum())
    imported = peak_mb()
    trained = distill(
        folder / "pruned",
        out,
        base=folder / "base",
        rows=folder / "data",
        runs=folder / "runs",
        on_progress=watch,
        **(plain | OURS[case]),
    )
    return {"peak": peak_mb() - imported, **clock.seconds(), "loss": trained.metrics["last"]["eval_loss"]}


def trl(case: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """One of TRL's trainers; imports nothing of ours."""
    import peft.tuners.lora  # noqa: F401
    import torch.profiler
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from transformers.models.llama import modeling_llama  # noqa: F401

    trainers = __import__("trl", fromlist=[case, case.replace("Trainer", "Config")])
    trainer_class, config_class = getattr(trainers, case), getattr(trainers, case.replace("Trainer", "Config"))
    rows = json.loads((folder / "rows.json").read_text())
    clock = Clock()

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.tick()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    class GivenRows(trainer_class):  # type: ignore[misc, valid-type]
        """For DistillationTrainer: the rows' own completions in place of written ones."""

        def _tokenize_prompts(self, prompts: list[str]) -> Any:
            self.numbers = [int(prompt) for prompt in prompts]
            return [rows[number][:1] for number in self.numbers], None, {}

        def _generate_single_turn(self, *_: Any, **__: Any) -> list[list[int]]:
            return [rows[number][1:] for number in self.numbers]

    imported = peak_mb()
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")

    def load(name: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32, attn_implementation="sdpa")

    out = folder / case
    arguments: dict[str, Any] = {
        "output_dir": str(out),
        "max_steps": options.steps,
        "per_device_train_batch_size": 1,
        "learning_rate": 2e-4,
        "warmup_steps": 1,
        "gradient_checkpointing": options.checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    lora = LoraConfig(r=options.rank, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    common: dict[str, Any] = {"model": load("pruned"), "processing_class": tokenizer, "peft_config": lora}
    if case == "SFTTrainer":
        config = config_class(**arguments, max_length=options.tokens)
        data = Dataset.from_dict({"input_ids": rows})
        trainer = trainer_class(args=config, train_dataset=data, callbacks=[Watch()], **common)
    else:
        config = config_class(**arguments, beta=0.0, max_completion_length=options.tokens)  # KL(teacher ‖ student)
        data = Dataset.from_dict({"prompt": [str(number) for number in range(len(rows))]})
        teacher = load("base")
        given: Any = GivenRows
        trainer = given(args=config, train_dataset=data, callbacks=[Watch()], teacher_model=teacher, **common)
    trainer.train()
    trainer.save_model(str(out / "adapters"))
    return {"peak": peak_mb() - imported, **clock.seconds()}


def run(python: str, case: str, folder: Path) -> dict[str, Any]:
    """A case in a process of its own; its error if it fails."""
    command = [python, __file__, *sys.argv[1:], "--case", case, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1][:160]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def show(found: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    """The table."""
    copy = found.get("copy", {}).get("peak")
    print(f"{'':22}{'peak memory':>14}{'of copy':>10}{'tokens/s':>11}{'per CPU second':>17}")
    for case, figures in found.items():
        if "error" in figures:
            print(f"{case:22}  {figures['error']}")
        else:
            share = f"{figures['peak'] / copy:.2f}" if copy else ""
            wall, cpu = (options.tokens / figures[name] for name in ("seconds", "cpu_seconds"))
            print(f"{case:22}{figures['peak']:>11.0f} MB{share:>10}{wall:>11.1f}{cpu:>17.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in {
        "hidden": 1280, "intermediate": 3456, "blocks": 16, "dropped": 3, "vocabulary": 4096,
        "tokens": 128, "steps": 6, "rank": 8, "top-k": 64,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True, help="TRL's default")
    parser.add_argument("--trl-python", help="the python of an environment with TRL")
    parser.add_argument("--cases", nargs="*", help="only these")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        if options.case == "prepare":
            print("\n" + json.dumps(prepare(options.folder, options)))
            return
        work = ours if options.case in OURS else trl
        print("\n" + json.dumps(work(options.case, options.folder, options)))
        return
    with tempfile.TemporaryDirectory() as name:
        made = run(sys.executable, "prepare", Path(name))
        print(json.dumps({"processor": platform.processor() or platform.machine(), **made}))
        cases = [*OURS, *TRL]
        found = {}
        for case in [case for case in cases if not options.cases or case in options.cases]:
            if case in OURS:
                found[case] = run(sys.executable, case, Path(name))
            elif options.trl_python:
                found["trl " + case] = run(options.trl_python, case, Path(name))
            else:
                found["trl " + case] = {"error": "give --trl-python PYTHON, of an environment with trl (see above)"}
    show(found, options)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
