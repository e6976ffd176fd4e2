"""The distill stage on a tiny pruned model: what it learns, measures, keeps, resumes and refuses."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compress.core.errors import UserError
from compress.core.stage import WORK, Context, Inputs, Progress
from compress.data.chat import Encoded, load_encoded
from compress.data.rows import Row, write_rows
from compress.distill import stage
from compress.distill.config import DistillConfig
from compress.modeling.blocks import drop_blocks
from compress.modeling.checkpoint import save_checkpoint
from compress.modeling.load import load_model, load_tokenizer
from compress.pipeline.recipe import Recipe
from compress.records.curves import TrainingStep, student_lines, write_lines
from compress.records.students import HeldOutFigures
from compress.training import run as training
from compress.training import students, train, weights
from compress.training.config import Copy
from compress.training.teacher import CopyTeacher, quantization
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer

LENGTH, SEED = 64, 7
LORA: dict[str, Any] = {"kind": "lora", "rank": 4, "alpha": 12.0}
WORDS = "the way of many people is which model time and look so é 42".split()
WEIGHTS = "model.layers.{}.{}.weight"


class World:
    """A base model, the same without one block, and a data stage's folder; runs the stage into fresh folders."""

    def __init__(self, killer: Callable[[int], Progress], base: Path, folder: Path):
        self.killer = killer
        self.folder, self.runs, self.base = folder, 0, base
        model = load_model(base)
        drop_blocks(model, [1])
        save_checkpoint(model, load_tokenizer(base), folder / "pruned")
        draw = random.Random(3)

        def talk(_: int) -> list[dict[str, str]]:
            turns = [" ".join(draw.choices(WORDS, k=draw.randrange(*span))) for span in ((2, 6), (4, 22))]
            return [{"role": role, "content": text} for role, text in zip(("user", "assistant"), turns, strict=True)]

        (folder / "data").mkdir()
        write_rows(folder / "data", [Row(i, "heldout" if i % 4 == 0 else "train", talk(i)) for i in range(24)])
        self.inputs = Inputs(base, folder / "pruned", {"data": folder / "data"})

    def config(self, **options: Any) -> DistillConfig:
        plain = {"objective": "kd", "tune": LORA, "lr": 1e-2, "length": LENGTH, "max_steps": 6, "accumulate": 2}
        return DistillConfig.model_validate(plain | {"eval_every": 3, "save_every": 2} | options)

    def __call__(self, *, out: Path | None = None, calls: int = 0, seed: int = SEED, **options: Any) -> dict[str, Any]:
        self.runs += 1
        self.out = out or self.folder / f"out{self.runs}"
        self.out.mkdir(exist_ok=True)
        config, context = self.config(**options), Context(seed=seed, progress=self.killer(calls))
        stage.check(config, self.base, context)
        return stage.run(config, self.inputs, self.out, context)

    def curves(self, measured: bool = False) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (self.out / "curves.jsonl").read_text().splitlines()]
        return [line for line in lines if ("eval_kl" in line) is measured]

    def rows(self, split: Any) -> list[Encoded]:
        return load_encoded(self.inputs.stages["data"], load_tokenizer(self.base), split, LENGTH)


@pytest.fixture(scope="module")
def world(
    killer: Callable[[int], Progress],
    tiny: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> World:
    base = tiny(blocks=4, hidden=32, heads=2, kv_heads=1, intermediate=128, seed=2)
    return World(killer, base, tmp_path_factory.mktemp("distill"))


def response_log_probs(model: Any, row: Encoded) -> tuple[Tensor, Tensor]:
    """(N, V) float64 log-probabilities at a row's response tokens, and the tokens; the row runs alone."""
    ids = torch.tensor([row.input_ids])
    at = [t for t in range(1, len(row.input_ids)) if row.loss_mask[t]]
    return model(input_ids=ids).logits[0].double().log_softmax(-1)[[t - 1 for t in at]], ids[0, at]


@torch.no_grad()
def figures(folder: Path, teacher: Path, rows: list[Encoded]) -> dict[str, float]:
    """KL to the teacher and perplexity over response tokens, row by row, without our losses or packing."""
    student, base = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, teacher))
    kl, nll, count = 0.0, 0.0, 0
    for row in rows:
        (log_s, targets), (log_t, _) = response_log_probs(student, row), response_log_probs(base, row)
        kl += float((log_t.exp() * (log_t - log_s)).sum())
        nll -= float(log_s[range(len(targets)), targets].sum())
        count += len(targets)
    return {"eval_kl": kl / count, "eval_perplexity": math.exp(nll / count)}


def model_bytes(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "model").iterdir())}


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("tune", [LORA | {"dropout": 0.1}, "full"], ids=["lora", "full"])
def test_kd_recovers_and_the_figures_are_those_of_the_models(world: World, tune: Any) -> None:
    metrics = world(tune=tune, max_steps=16, batch=2, eval_every=8)
    before, after = (
        figures(path, world.base, world.rows("heldout")) for path in (world.inputs.model, world.out / "model")
    )
    assert after["eval_kl"] < 0.6 * before["eval_kl"]
    assert {name: metrics["before"][name] for name in before} == pytest.approx(before, rel=1e-4)
    assert {name: metrics["best"][name] for name in after} == pytest.approx(after, rel=1e-4)
    assert [line["step"] for line in world.curves(measured=True)] == [0, 8, 16]
    assert metrics["best"] == min(world.curves(measured=True), key=lambda line: line["eval_kl"])
    assert {path.name for path in world.out.iterdir()} == {"model", "curves.jsonl", WORK}
    old, new = tensors(world.inputs.model), tensors(world.out / "model")
    adapted = {name for name in old if name.endswith("_proj.weight")}
    assert {name for name in old if not torch.equal(old[name], new[name])} == (set(old) if tune == "full" else adapted)


def test_learning_all_tokens_counts_prompts_too(world: World) -> None:
    """The first step's loss is the mean KL over every token but each row's first, held-out figures stay those of
    answers."""
    answers, every = (world(max_steps=1, accumulate=99, learn=learn) for learn in ("answers", "all"))
    assert every["before"] == answers["before"]
    rows = [Encoded(row.input_ids, [True] * len(row.input_ids)) for row in world.rows("train")]
    assert every["target_tokens"] == sum(len(row.input_ids) - 1 for row in rows) > answers["target_tokens"]
    [step] = world.curves()
    expected = figures(world.inputs.model, world.base, rows)["eval_kl"]
    assert step["loss"] == pytest.approx(expected, rel=1e-4)


def test_stored_predictions_are_of_answers_alone() -> None:
    data = {"source": "magpie", "teacher": {"top_k": 8}}
    distill = {"objective": "kd", "teacher": "cached", "learn": "all"}
    with pytest.raises(UserError, match="with teacher: cached leave it out"):
        Recipe.from_dict({"name": "r", "model": "random:llama", "data": data, "distill": distill})


@pytest.mark.parametrize("objective", ["sft", "kd"])
@pytest.mark.parametrize(("batch", "accumulate"), [(1, 99), (2, 99), (99, 1)])
def test_a_step_is_the_mean_over_all_its_response_tokens(
    world: World, monkeypatch: pytest.MonkeyPatch, objective: str, batch: int, accumulate: int
) -> None:
    """However the rows are packed and split up: loss and gradient as of the plain sum over rows, divided once."""
    gradients: dict[str, Tensor] = {}

    def keep(recorder: Any, *_: Any, **__: Any) -> None:
        named = recorder.trainer.student.model.named_parameters()
        gradients.update({name: parameter.grad.clone() for name, parameter in named})

    monkeypatch.setattr(train.Recorder, "on_pre_optimizer_step", keep)
    world(objective=objective, tune="full", batch=batch, accumulate=accumulate, max_steps=1, clip=1e9)
    student, teacher = load_model(world.inputs.model), load_model(world.base)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in world.rows("train"):
        log_s, targets = response_log_probs(student, row)
        log_t = response_log_probs(teacher, row)[0].detach()
        count += len(targets)
        kd = (log_t.exp() * (log_t - log_s)).sum()
        total = total + (kd if objective == "kd" else -log_s[range(len(targets)), targets].sum())
    (total / count).backward()
    (line,) = world.curves()
    assert (line["tokens"], line["epoch"]) == (count, 1.0)
    assert line["loss"] == pytest.approx(float(total.detach()) / count, rel=1e-5)
    assert ("kl" in line) is (objective == "kd")  # sft trains without a teacher beside it
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: n + m)


def test_the_rate_of_each_step_is_recorded(world: World) -> None:
    world(max_steps=8, warmup=0.2, lr=1e-3)
    wanted = [0, 5e-4] + [5e-4 * (1 + math.cos(math.pi * k / 6)) for k in range(6)]
    assert [line["lr"] for line in world.curves()] == pytest.approx(wanted)
    world(max_steps=1, warmup=0.5, lr=1e-3)  # the only step is not lost on warming up
    assert [line["lr"] for line in world.curves()] == [1e-3]
    assert world.curves(measured=True)[0]["eval_kl"] != world.curves(measured=True)[1]["eval_kl"]


def test_an_epoch_sees_every_row_once(world: World) -> None:
    metrics = world(max_steps=None, epochs=2, accumulate=3, lr=1e-12, schedule="constant")
    lines, rows = world.curves(), world.rows("train")
    targets = sum(sum(row.loss_mask) for row in rows)
    half = len(lines) // 2
    assert metrics["steps"] == len(lines) == 2 * half and lines[-1]["epoch"] == 2.0
    assert metrics["train_tokens"] == sum(len(row.input_ids) for row in rows)
    assert metrics["target_tokens"] == 2 * targets
    kl = figures(world.inputs.model, world.base, rows)["eval_kl"]
    for part in (lines[:half], lines[half:]):
        assert sum(line["tokens"] for line in part) == targets
        assert sum(line["tokens"] * line["loss"] for line in part) / targets == pytest.approx(kl, rel=1e-4)
    assert [line["tokens"] for line in lines[:half]] != [line["tokens"] for line in lines[half:]]  # in another order


RESUMED = {
    "lora": {"tune": LORA | {"dropout": 0.2}},
    "full": {"tune": "full", "objective": "asft"},
    "8bit": {"optimizer": "adamw_8bit", "objective": "dft", "tune": "full"},  # so small adapters keep 32 bits
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_killed_run_ends_with_the_same_bytes(world: World, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Killed before the first checkpoint, after one, while one is written, in the last step and while saving."""
    options = RESUMED[name] | {"max_steps": 8}
    metrics = world(**options)
    whole, out = world.out, world.folder / f"killed-{name}"
    started: list[str | None] = []
    plain_train = Trainer.train

    def note_start(self: Any, resume_from_checkpoint: str | None = None) -> Any:
        started.append(resume_from_checkpoint and Path(resume_from_checkpoint).name)
        return plain_train(self, resume_from_checkpoint=resume_from_checkpoint)

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "train", note_start)
    for calls in (2, 4, 2):  # the first call tells where the run starts, each further one ends a step
        with pytest.raises(KeyboardInterrupt):
            world(out=out, calls=calls, **options)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_save_rng_state", stop)
        world(out=out, **options)
    assert (out / WORK / "trainer" / "checkpoint-4").is_dir()
    with pytest.raises(KeyboardInterrupt):
        world(out=out, calls=7, **options)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "save_checkpoint", stop)
        world(out=out, **options)
    again = world(out=out, **options)
    assert started == [None, None, "checkpoint-2", "checkpoint-2", "checkpoint-2", "checkpoint-6", "checkpoint-6"]
    assert model_bytes(out) == model_bytes(whole)
    assert (out / "curves.jsonl").read_bytes() == (whole / "curves.jsonl").read_bytes()
    del metrics["seconds_training"], again["seconds_training"]
    assert again == metrics


def test_checkpoints_cut_short_are_removed_and_the_newest_whole_one_is_taken(tmp_path: Path) -> None:
    assert weights.latest_checkpoint(tmp_path / "none") is None
    for number in (9, 10, 11):
        (tmp_path / f"checkpoint-{number}").mkdir()
        (tmp_path / f"checkpoint-{number}" / weights.WEIGHTS).touch()
    assert weights.latest_checkpoint(tmp_path) is None and not list(tmp_path.iterdir())
    for number in (9, 10, 11):
        (tmp_path / f"checkpoint-{number}").mkdir()
    for number in (9, 10):
        (tmp_path / f"checkpoint-{number}" / weights.WHOLE).touch()
    assert weights.latest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9"]
    steps = [TrainingStep(step=number, epoch=0.5, loss=1.0, nll=1.0, lr=0.1, tokens=8) for number in (1, 2)]
    write_lines(tmp_path / "curves", steps)
    with (tmp_path / "curves").open("a") as file:
        file.write('{"st')
    assert student_lines(tmp_path / "curves") == steps


@pytest.mark.parametrize("bits", [None, "nf4"])
def test_the_merge_is_the_full_weights_plus_the_adapters(world: World, bits: str | None) -> None:
    options = {"tune": LORA | {"quantize_base": bits, "targets": ["q_proj", "down_proj"]}, "max_steps": 4}
    metrics = world(select="last", **options)
    assert metrics["last"]["eval_kl"] < metrics["before"]["eval_kl"]
    old, new = tensors(world.inputs.model), tensors(world.out / "model")
    adapters = load_file(world.out / WORK / "best.safetensors")
    for name, weight in old.items():
        stem = "model.base_model.model." + name.removesuffix(".weight")
        change = torch.zeros(())
        if name.endswith(("q_proj.weight", "down_proj.weight")):
            change = 12.0 / 4 * adapters[f"{stem}.lora_B.default.weight"] @ adapters[f"{stem}.lora_A.default.weight"]
            assert change.abs().max() > 1e-3
        torch.testing.assert_close(new[name], weight + change, rtol=0, atol=1e-6)
    assert len(adapters) == 2 * 2 * 3 and metrics["trainable_parameters"] == sum(a.numel() for a in adapters.values())
    student = students.build_student(world.config(**options), world.inputs, Context(seed=SEED), quantize=False)
    weights.load_trainable(student, world.out / WORK / "best.safetensors")
    ids = torch.arange(3, 43).reshape(2, 20)
    with torch.no_grad():
        adapted, merged = student.model(ids).logits, load_model(world.out / "model")(ids).logits  # type: ignore[operator]
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("bits", "most"), [("nf4", 0.3), ("int8", 0.05)])
def test_a_teacher_in_fewer_bits_is_nearly_the_teacher(
    world: World, tiny: Callable[..., Path], bits: Any, most: float, tied: bool
) -> None:
    folder = tiny(blocks=2, tied=tied)
    exact, coarse = (CopyTeacher(folder, Copy(quantize=kind), Context()) for kind in (None, bits))
    batch = training.pack_rows(world.config(), world.rows("heldout"), load_tokenizer(folder))[0]
    wanted, found = exact.hidden(batch), coarse.hidden(batch)
    assert 1e-4 < float((found - wanted).norm() / wanted.norm()) < most
    assert torch.equal(coarse.head.weight, exact.head.weight)  # the head keeps its bits
    assert not any(parameter.requires_grad for parameter in coarse.decoder.model.parameters())
    assert quantization(None, "float32") == {}


@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_learning_from_a_teacher_in_fewer_bits(world: World, bits: str) -> None:
    world(teacher={"kind": "copy", "quantize": bits}, max_steps=8)
    before, after = (
        figures(path, world.base, world.rows("heldout")) for path in (world.inputs.model, world.out / "model")
    )
    assert after["eval_kl"] < 0.9 * before["eval_kl"]


SCRIPT = [  # step 0 first
    {"eval_loss": 5.0, "eval_kl": 4.0, "eval_perplexity": 9.0},
    {"eval_loss": 2.0, "eval_kl": 3.0, "eval_perplexity": 9.5},
    {"eval_loss": 2.0, "eval_kl": 1.0, "eval_perplexity": 9.6},
    {"eval_loss": 3.0, "eval_kl": 1.5, "eval_perplexity": 9.7},
]


@pytest.mark.parametrize(("select", "step"), [("kl", 2), ("perplexity", 0), ("loss", 1), ("last", 3)])
def test_the_best_weights_are_kept(world: World, monkeypatch: pytest.MonkeyPatch, select: str, step: int) -> None:
    seen: list[dict[str, Tensor]] = []

    def measure(trainer: Any, step: int) -> HeldOutFigures:
        seen.append({name: value.clone() for name, value in trainer.student.model.state_dict().items()})
        return HeldOutFigures(step=step, **SCRIPT[len(seen) - 1])

    monkeypatch.setattr(train.DistillTrainer, "measure", measure)
    metrics = world(tune="full", select=select, max_steps=3, eval_every=1, warmup=0)
    assert metrics["best"] == {"step": step, **SCRIPT[step]}
    assert (metrics["before"]["eval_kl"], metrics["last"]["eval_kl"]) == (4.0, 1.5)
    kept = tensors(world.out / "model")
    assert [all(torch.equal(kept[name], state[name]) for name in kept) for state in seen] == [
        i == step for i in range(4)
    ]


def test_the_seed_decides(world: World) -> None:
    found = []
    for seed in (1, 1, 2):
        world(seed=seed, max_steps=1)
        found.append(model_bytes(world.out))
    assert found[0] == found[1] != found[2]


def test_gradient_checkpointing_learns_the_same(world: World) -> None:
    lines = []
    for on in (False, True):
        world(gradient_checkpointing=on, tune="full", max_steps=3)
        lines.append([line["loss"] for line in world.curves()])
    assert lines[0] == pytest.approx(lines[1], rel=1e-5)


def test_adamw_in_8_bits_holds_its_moments_in_8_bits(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    plain = train.Recorder.on_step_end

    def keep(recorder: Any, *args: Any, **options: Any) -> None:
        kept.append(recorder.trainer.optimizer)
        plain(recorder, *args, **options)

    monkeypatch.setattr(train.Recorder, "on_step_end", keep)
    losses = []
    for optimizer in ("adamw", "adamw_8bit"):
        world(optimizer=optimizer, tune="full")
        losses.append([line["loss"] for line in world.curves()])
    assert losses[0] == pytest.approx(losses[1], rel=0.05) and losses[0][-1] < 0.5 * losses[0][0]
    # bitsandbytes leaves small tensors alone, transformers embeddings.
    big = [state for p, state in kept[-1].state.items() if p.shape in ((128, 32), (32, 128))]
    assert big and all(state[name].dtype == torch.uint8 for state in big for name in ("state1", "state2"))


@pytest.mark.parametrize("tune", [LORA, "full"], ids=["lora", "full"])
def test_mixed_precision_learns_nearly_the_same(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tune: Any
) -> None:
    """What is trained stays float32; products are bfloat16, which has 8 bits."""
    seen: dict[str, set[torch.dtype]] = {"trained": set(), "products": set()}
    plain = train.Student.forward

    def keep(student: Any, **inputs: Any) -> Any:
        seen["trained"] |= {p.dtype for p in student.parameters() if p.requires_grad}
        seen["products"].add((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
        return plain(student, **inputs)

    monkeypatch.setattr(train.Student, "forward", keep)
    world(tune=tune)
    wanted = [line["loss"] for line in world.curves()]
    assert seen["products"] == {torch.float32}
    seen["products"].clear()
    (tmp_path / WORK).mkdir()
    stage.run(world.config(tune=tune), world.inputs, tmp_path, Context(seed=SEED, dtype="bfloat16"))
    lines = [json.loads(line) for line in (tmp_path / "curves.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == pytest.approx(wanted, rel=0.1)
    assert seen == {"trained": {torch.float32}, "products": {torch.bfloat16}}
    assert {value.dtype for value in tensors(tmp_path / "model").values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("every", "message"), [(1, r"the held-out loss is nan at step \d"), (99, r"the training loss is nan")]
)
def test_divergence_is_an_error(world: World, every: int, message: str) -> None:
    with pytest.raises(UserError, match=message + r".*training diverged\. Lower distill\.lr \(it is 1e\+20\)"):
        world(lr=1e20, tune="full", eval_every=every)
    assert not (world.out / "model").exists()


@pytest.mark.parametrize("target", ["v_porj", "lm_head", "embed_tokens", "proj"])
def test_targets_that_are_no_layers_of_the_blocks_are_refused(world: World, target: str) -> None:
    with pytest.raises(
        UserError, match=rf"no linear layer '{target}'; they have: q_proj, k_proj, v_proj, o_proj, gate"
    ):
        world(tune=LORA | {"targets": ["q_proj", target]})


def test_weights_of_another_recipe_are_refused(world: World) -> None:
    with pytest.raises(KeyboardInterrupt):
        world(calls=5)
    with pytest.raises(UserError, match="does not hold the parameters this recipe trains"):
        world(out=world.out, tune="full")


@pytest.mark.parametrize("options", [{"teacher": {"kind": "copy", "quantize": "int8"}}, {"optimizer": "adamw_8bit"}])
def test_fewer_bits_need_bitsandbytes(world: World, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"distill: (int8|adamw_8bit) needs bitsandbytes"):
        world(**options)
    stage.check(world.config(), world.base, Context())


def test_reading_the_configuration_does_not_import_torch() -> None:
    code = "import sys, compress.distill.config, compress.prune.config; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
