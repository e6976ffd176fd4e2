"""Plans against what models really have, count and hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from compress.cli import main as cli
from compress.core.cost import BYTES, MOMENTS, PARTS, Need, RowCounts, Setting, worst
from compress.core.errors import UserError
from compress.core.geometry import Geometry
from compress.core.stage import Context, Inputs
from compress.core.work import forward
from compress.data.cost import rows_of
from compress.data.sampling import Sampling, sample
from compress.distill.config import DistillConfig
from compress.export.config import ExportConfig, GgufType, OnnxPrecision
from compress.export.cost import rivals
from compress.export.gguf import write_gguf
from compress.merge.config import Dtype
from compress.modeling.blocks import Decoder
from compress.modeling.geometry import geometry_of
from compress.modeling.load import load_config, load_model
from compress.pipeline.plan import find_device, make_plan, parse_size, read_geometry, settings, smallest_change
from compress.pipeline.plan.devices import DEVICES, GIB
from compress.pipeline.recipe import Recipe, shipped
from compress.pipeline.stages import STAGES
from compress.runtime.artifact_types import ARTIFACT_TYPES, GGUF_TYPES, ONNX_TYPES
from compress.runtime.cost import artifact_bytes
from compress.training.config import Full, Lora
from compress.training.cost import lora_parameters
from compress.training.students import build_student
from compress.training.train import OPTIMIZERS
from torch.utils.flop_counter import FlopCounterMode

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3_text")
LLAMA_8B = Path(__file__).parents[2] / "recipes" / "configs" / "llama3_1_8b.json"


def shape_of(folder: Path) -> Geometry:
    return geometry_of(load_config(folder).to_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_the_models(tiny, family):
    folder = tiny(family)
    model = load_model(folder)
    shape = shape_of(folder)
    real = sum(p.numel() for p in model.parameters())
    assert shape.parameters(shape.blocks) == pytest.approx(real, rel=0.02)  # biases and further norms are left out
    if family == "llama":
        assert shape.parameters(shape.blocks) == real
    cache = model(torch.ones((2, 10), dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert shape.kv_bytes(20, 4) == held


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_files_shape_is_its_checkpoints(tiny, tmp_path, tied):
    folder = tiny(tied=tied)
    write_gguf(folder, tmp_path / "m.gguf", "F16")
    (tmp_path / "r.yaml").write_text(f"name: r\nmodel: {tmp_path / 'm.gguf'}\n")
    assert read_geometry(Recipe.load(str(tmp_path / "r.yaml")), tmp_path) == shape_of(folder)


def counted(work: Any) -> int:
    """Operations of matrix products and attention, by torch's own counter."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def test_operations_of_a_forward_pass_are_torchs(tiny):
    folder = tiny(blocks=3)
    model, shape = load_model(folder), shape_of(folder)
    model.set_attn_implementation("eager")  # the counter does not know the fused one's operations on CPUs
    ids = torch.ones((2, 64), dtype=torch.long)
    # torch counts every pair of tokens, whether the mask hides it or not: a context of 64 each
    assert forward(shape, 3, 128, 64) == counted(lambda: model(ids))
    assert forward(shape, 3, 128, 64, heads=2) == counted(lambda: model(ids, logits_to_keep=1))
    longer = forward(shape, 3, 128, 128, 0) - forward(shape, 3, 128, 64, 0)
    assert longer == 128 * 64 * 4 * 3 * shape.heads * shape.head_size


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_operations_of_training_are_torchs(tiny, kind):
    """6 per weight and token with every weight trained, 4 where they are frozen, and the anchor's 2."""
    folder = tiny(blocks=3, hidden=128, heads=4, intermediate=256)
    shape = shape_of(folder)
    tune = {"kind": kind, "rank": 1} if kind == "lora" else {"kind": kind}
    values = {"tune": tune, "objective": "sft", "length": 64, "max_steps": 1, "accumulate": 1, "eval_every": 1}
    config = DistillConfig.model_validate(values)
    student = build_student(config, Inputs(folder, folder), Context())
    student.decoder.model.set_attn_implementation("eager")
    ids = torch.ones((1, 64), dtype=torch.long)

    def train() -> None:
        (hidden,) = student(input_ids=ids, use_cache=False)
        (hidden @ student.decoder.head_weight.T).sum().backward()

    recipe = Recipe.load("tiny_random", ["data.rows=64", "data.heldout=0.000001"])
    at = Setting(shape, 3, "float32", rows=rows_of(recipe.data))
    work = STAGES["distill"].cost.work
    found = work(config, at)
    assert found is not None
    # Eager attention multiplies every pair of tokens, hidden by the mask or not; the plan counts half of them.
    factor = 2 if kind == "lora" else 3
    pairs = factor * 64 * 32 * 4 * 3 * shape.heads * shape.head_size
    assert found.flops == pytest.approx(counted(train) - pairs, rel=0.06)  # nothing flows back past the first block
    anchored = config.model_copy(update={"objective": DistillConfig.model_validate({"objective": "kd"}).objective})
    more = work(anchored, at)
    assert more is not None and more.flops - found.flops == forward(shape, 3, 64, 32)
    again = work(config.model_copy(update={"gradient_checkpointing": True}), at)
    assert again is not None and again.flops - found.flops == forward(shape, 3, 64, 32)


def test_rows_that_the_student_writes_cost_their_decoding(tiny):
    """As torch counts it, for one row; and the memory of what is sampled at once, where that is the most."""
    folder = tiny(blocks=3, hidden=128, heads=4, intermediate=256)
    cost = STAGES["distill"].cost
    rows = rows_of(Recipe.load("tiny_random", ["data.rows=64", "data.heldout=0.000001"]).data)
    at = Setting(shape_of(folder), 3, "float32", rows=rows)
    row, answer = round(rows.tokens / rows.count), round(rows.learned / rows.count)

    def section(**own: Any) -> DistillConfig:
        plain = {"objective": "kd", "length": row, "max_steps": 1, "accumulate": 1, "chunk": 1}
        return DistillConfig.model_validate(plain | {"on_policy": own or None})

    without, written = cost.work(section(), at), cost.work(section(share=1, max_tokens=24), at)
    model = load_model(folder)
    model.set_attn_implementation("eager")
    prompt = list(range(3, 3 + row - answer))
    real = counted(lambda: sample(model, [prompt], [1], Sampling(24, 0.9), stop=()))
    assert without is not None and written is not None
    assert written.flops - without.flops == pytest.approx(real, rel=0.06)
    assert written.read > 24 * shape_of(folder).parameters(3) * 4 > without.read
    few, many = (cost.need(section(batch=batch, max_tokens=1), at) for batch in (1, 2000))
    assert few.peak == cost.need(section(), at).peak < many.peak
    assert many.parts["kv"] == shape_of(folder).kv_bytes(2000 * row, 4, 3)
    longer = cost.need(section(max_tokens=answer + row, share=1), at).parts["activations"]
    assert longer == pytest.approx(2 * few.parts["activations"], rel=0.02)  # a row may become twice as long


def test_the_local_phase_costs_a_few_blocks(tiny):
    """Each further epoch costs the trained blocks' operations, as torch counts them; the states are temporary."""
    folder = tiny(blocks=6, hidden=128, heads=4, intermediate=256)
    shape, cost = shape_of(folder), STAGES["distill"].cost
    rows = rows_of(Recipe.load("tiny_random", ["data.rows=64", "data.heldout=0.000001"]).data)
    at = Setting(shape, 5, "float32", rows=rows)

    def section(**local: Any) -> DistillConfig:
        return DistillConfig.model_validate({"length": 64, "local": local or None})

    first, second = (cost.work(section(reach=1, epochs=epochs), at) for epochs in (1, 2))
    model = load_model(folder)
    decoder, ids = Decoder(model), torch.arange(64)[None]
    model.set_attn_implementation("eager")
    hidden = torch.randn(1, 64, 128, requires_grad=True)
    real = counted(lambda: decoder.run(hidden, [1, 2], ids).sum().backward())
    pairs = 3 * 64 * 32 * 4 * 2 * shape.heads * shape.head_size
    assert first is not None and second is not None
    assert (second.flops - first.flops) / rows.tokens * 64 == pytest.approx(real - pairs, rel=0.01)
    plain, local = cost.need(section(), at), cost.need(section(reach=1), at)
    assert local.scratch - plain.scratch == rows.tokens * 128 * 3 * 2
    assert cost.need(section(reach=2), at).peak >= local.peak >= plain.peak


def test_adapters_are_pefts(tiny):
    folder = tiny(blocks=3)
    for targets in ("all-linear", ["q_proj", "down_proj"]):
        tune = Lora(rank=4, targets=targets)
        student = build_student(DistillConfig(tune=tune), Inputs(folder, folder), Context())
        real = sum(p.numel() for p in student.parameters() if p.requires_grad)
        assert lora_parameters(tune, shape_of(folder), 3) == real


def test_the_worst_moment_counts_not_the_sum():
    assert worst({"weights": 5, "kv": 0}, {"logits": 2, "runtime": 4}) == {"runtime": 4, "logits": 2}


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_has_a_plan(name, tmp_path):
    loaded = Recipe.load(name)
    for device in (None, DEVICES["h100-80g"]):
        plan = make_plan(loaded, device.dtype if device else "float32", tmp_path, device)
        assert [stage.name for stage in plan.stages] == list(loaded.order)
        for stage in plan.stages:
            assert stage.need.peak == sum(stage.need.parts.values()) > 0
            assert set(stage.need.parts) <= set(PARTS)
            assert (stage.seconds is None) == (device is None or stage.flops is None)


def found_by(stage: str, loaded: Recipe, dtype: str, cuda: bool) -> Setting:
    """What a stage of a recipe for Llama-3.1-8B finds."""
    return settings(loaded, geometry_of(json.loads(LLAMA_8B.read_text())), dtype, cuda)[0][stage]


def need(stage: str, loaded: Recipe, at: Setting) -> Need:
    return STAGES[stage].cost.need(loaded.section(stage), at)


def memory(overrides: list[str], cuda: bool = True) -> dict[str, int]:
    loaded = Recipe.load("llama8b_26L", overrides)
    return need("distill", loaded, found_by("distill", loaded, "bfloat16", cuda)).parts


def test_parts_follow_the_recipe():
    plain = memory(["distill.teacher=copy", "distill.tune.quantize_base=null"])
    assert plain["weights"] == pytest.approx(6.72e9 * 2, rel=0.01)
    assert plain["teacher"] == pytest.approx(8.03e9 * 2, rel=0.01)
    copied = {"distill.teacher": "{kind: copy, quantize: nf4}", "distill.tune.quantize_base": "nf4"}
    quantized = memory([f"{key}={value}" for key, value in copied.items()])
    assert quantized["weights"] < 0.3 * plain["weights"] and quantized["teacher"] < 0.3 * plain["teacher"]
    assert "teacher" not in memory(["distill.teacher=shared"])
    stored = memory(["distill.gradient_checkpointing=false"])
    assert stored["activations"] > 8 * quantized["activations"]
    assert memory(["distill.chunk=512"])["logits"] == 2 * quantized["logits"]
    own = ["distill.tune.quantize_base=null", "distill.tune.quantize_as=Q4_K_M", "merge=null"]
    rounded = memory(["distill.teacher=copy", *own])
    blocks = plain["weights"] - 2 * 2 * 128256 * 4096  # the rounded ones beside them, in bfloat16, with scales
    assert rounded["weights"] - plain["weights"] == pytest.approx(1.25 * blocks, rel=0.02)
    tuned = ["distill.tune=full", "distill.teacher=copy"]
    full = memory(tuned)
    assert full["weights"] == pytest.approx(6.72e9 * 4, rel=0.01)
    assert full["optimizer"] == pytest.approx(6.72e9 * 12, rel=0.01)
    assert memory([*tuned, "distill.optimizer=adamw_8bit"])["optimizer"] == full["optimizer"] // 2


def test_the_smallest_change_fits_and_nothing_less_does():
    base = ["distill.teacher=copy", "distill.tune.quantize_base=null", "distill.gradient_checkpointing=false"]
    loaded = Recipe.load("llama8b_26L", base)
    at = found_by("distill", loaded, "bfloat16", True)
    needed = need("distill", loaded, at).needed
    assert smallest_change(loaded, "distill", at, needed - 1) is not None
    for room in (24, 13):
        change = smallest_change(loaded, "distill", at, room * GIB)
        assert change is not None and change.memory <= room * GIB < needed
        planned = memory([*base, *change.overrides])
        assert sum(planned.values()) == change.memory
        kinds = {override.rpartition(".")[0] for override in change.overrides}
        for kind in kinds:  # overrides of one key belong together
            rest = [o for o in change.overrides if o.rpartition(".")[0] != kind]
            if kind != "distill":
                assert sum(memory([*base, *rest]).values()) > room * GIB
    assert smallest_change(loaded, "distill", at, GIB) is None
    one = smallest_change(loaded, "distill", at, needed - 1)
    assert one is not None and one.overrides == ("distill.chunk=128",)  # which changes no result


def test_what_does_not_fit_is_named_with_its_change(monkeypatch, capsys):
    arguments = ["compress", "plan", "llama8b_26L", "--on", "rtx-4090", "--set", "distill.teacher=copy"]
    arguments += ["--set", "distill.tune.quantize_base=null"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit):
        cli.main()
    out = " ".join(capsys.readouterr().out.split())
    assert "DOES NOT FIT" in out and "are reached (assumed)" in out
    assert "smallest change: --set distill.teacher=shared" in out
    monkeypatch.setattr(sys, "argv", [*arguments[:3], "--on", "h100-80g"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "every stage fits in 85.90 GB" in capsys.readouterr().out


def test_scratch_files_that_are_mapped_need_no_memory():
    loaded = Recipe.load("llama8b_26L", ["evaluate.rival=false"])
    found = need("evaluate", loaded, found_by("evaluate", loaded, "float32", False))
    assert found.parts["mapped"] == found.scratch == 4096 * 128256 * 2
    few = Recipe.load("llama8b_26L", ["data.rows=100", "data.prose=null"])  # two of them held out
    at = found_by("evaluate", few, "float32", False)
    assert need("evaluate", few, at).parts["mapped"] == 2 * 768 * 128256 * 2
    assert found.needed == found.peak - found.parts["mapped"]


def test_rivals_take_disk_and_time():
    """Those of a cut model, of a trained one, and where they are asked for; each is written, tried and measured."""
    loaded = Recipe.load("llama8b_26L")
    at = found_by("evaluate", loaded, "float32", False)
    cost = STAGES["evaluate"].cost

    def costs(at: Setting, *overrides: str) -> tuple[int, float]:
        section = Recipe.load("llama8b_26L", list(overrides)).section("evaluate")
        work = cost.work(section, at)
        assert work is not None
        return cost.need(section, at).scratch, work.total

    with_them, without = costs(at), costs(at, "evaluate.rival=false")
    planned = rivals(at)
    assert planned.measured and set(planned.measured) < set(planned.made)
    assert with_them[0] - without[0] == planned.scratch and with_them[1] > without[1]
    whole, limit = (
        at.shape.parameters(32),
        max(artifact_bytes(file.type, at.shape.parameters(26)) for file in at.artifacts),
    )
    assert all(artifact_bytes(file.type, whole) <= limit for file in planned.made)
    assert "rivals" in cost.need(loaded.section("evaluate"), at).note
    uncut = replace(
        at, kept=32, artifacts=tuple(f._replace(blocks=32) for f in at.artifacts), recovered=False, depths=()
    )
    assert costs(uncut) == costs(uncut, "evaluate.rival=false") != costs(uncut, "evaluate.rival=true")
    assert costs(replace(uncut, recovered=True))[0] > costs(uncut)[0]
    assert costs(at, "evaluate.artifacts=false")[0] == without[0]


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24e9), ("24", 24e9), ("1.5 GiB", 1.5 * GIB), ("500mb", 5e8), ("2T", 2e12)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "many", "-3GB", "0GB", "3XB", "GB"])
def test_sizes_that_are_none(text):
    with pytest.raises(UserError, match="write a size such as 24GB"):
        parse_size(text)


def test_unknown_devices_are_refused():
    with pytest.raises(UserError, match="did you mean rtx-4090"):
        find_device("rtx4090")
    assert find_device("a100-80g").memory == 80 * GIB


def test_what_cannot_be_told_has_no_time():
    at = Setting(Geometry(8, 64, 96, 4, 2, 16, 451, True), 6, "float32")
    for override in ("prune.search=beam", "prune.blocks=auto", "prune.importance=taylor"):
        loaded = Recipe.load("tiny_random", [override])
        assert STAGES["prune"].cost.work(loaded.section("prune"), at) is None
    assert STAGES["distill"].cost.work(DistillConfig(tune=Full()), at) is None  # how many rows is not known


def test_the_plan_is_within_15_percent_of_what_a_run_holds(tmp_path):
    """The real command in a process of its own; the report then has both figures."""
    command = [sys.executable, "-m", "compress.cli.main", "run", "tiny_random", "--runs", str(tmp_path)]
    command += ["--until", "distill", "--set", "data.rows=8", "--set", "distill.max_steps=1"]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    report = json.loads((tmp_path / "tiny-random" / "report.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == ["data", "prune", "distill"]
    for stage in report["stages"]:
        assert stage["planned_memory_bytes"] == pytest.approx(stage["peak_memory_bytes"], rel=0.15), stage["name"]


def test_further_depths_cost_little_disk_and_a_look_each(tiny):
    at = Setting(shape_of(tiny()), 4, "float32")
    one, three = (
        ExportConfig.model_validate({"gguf": ["F16"], "onnx": ["int4"], "depths": depths})
        for depths in (None, [1, 2, 4])
    )
    cost = STAGES["export"].cost
    less, more = (cost.need(config, at) for config in (one, three))
    extra = more.disk - less.disk
    assert extra == 2 * 64 * at.shape.vocab + (1 + 2) * 9000
    # keys and values × 4 blocks × 2 KV heads × 16
    assert more.note == "F16, int4 at 3 depths; keys and values of a token: 1.0 kB in float32, 0.5 kB in f16"
    works = [cost.work(config, at) for config in (one, three)]
    assert works[0] and works[1] and works[0].total < works[1].total < 3 * works[0].total
    rounded = ExportConfig.model_validate({"onnx": ["int4"], "kv": "int8"})
    assert cost.need(rounded, at).note == "int4; keys and values of a token: 0.3 kB in int8"
    plain = cost.work(ExportConfig.model_validate({"onnx": ["int4"]}), at)
    work = cost.work(rounded, at)
    assert plain and work and work.total > plain.total + forward(at.shape, 4, 4096 + 1024, 0)


def test_training_scales_costs_by_types_steps_and_rows(tiny):
    at = Setting(
        Geometry(32, 4096, 14336, 32, 8, 128, 128256, False), 26, "bfloat16", rows=RowCounts(96, 20000, 0.1, 99)
    )
    cost = STAGES["export"].cost

    def work(train: dict[str, object] | None, **types: list[str]) -> float:
        found = cost.work(ExportConfig.model_validate({"train_scales": train, **types}), at)
        assert found is not None
        return found.total

    plain, one = work(None, onnx=["int4"]), work({}, onnx=["int4"])
    more = work({"steps": 120}, onnx=["int4"])
    products = 6 * at.kept * at.shape.block_products * 60 * 2 * (20000 // 96)  # forward, and two backward
    assert products < one - plain < 1.7 * products
    assert one < more < plain + 2 * (one - plain)  # the checkpoint looks once
    assert work({}, onnx=["int4"], gguf=["F16"]) - work(None, onnx=["int4"], gguf=["F16"]) == pytest.approx(one - plain)
    many: dict[str, object] = {"batch": 64}
    trains: list[dict[str, object] | None] = [None, {}, many, many | {"gradient_checkpointing": True}]
    none, few, most, recomputed = (
        cost.need(ExportConfig.model_validate({"gguf": ["Q4_0"], "train_scales": train}), replace(at, cuda=True)).peak
        for train in trains
    )
    assert none < few < 1.5 * none and few < recomputed < most
    keys = [
        changes[0] for changes in cost.changes(ExportConfig.model_validate({"gguf": ["Q4_0"], "train_scales": {}}), at)
    ]
    assert keys == ["export.train_scales.gradient_checkpointing=true", "export.train_scales.batch=1"]


def test_every_type_and_optimizer_has_its_bits():
    """The tables that plans and code share have a line for all that a recipe may name, and no other."""
    assert set(GGUF_TYPES) == set(get_args(GgufType)) and set(ONNX_TYPES) == set(get_args(OnnxPrecision))
    assert all(bits.typical <= bits.most for bits in ARTIFACT_TYPES.values())
    optimizer = DistillConfig.model_fields["optimizer"].annotation
    assert set(MOMENTS) == set(OPTIMIZERS) == set(get_args(optimizer))
    sizes = {name: torch.empty(0, dtype=getattr(torch, name)).element_size() for name in BYTES}
    assert sizes == BYTES and set(get_args(Dtype)) == set(BYTES)


def test_depths_to_export_must_end_with_what_pruning_leaves(tiny, tmp_path):
    (tmp_path / "r.yaml").write_text(
        f"name: r\nmodel: {tiny()}\nprune: {{blocks: 1, calibration: {{text: r.yaml}}}}\n"
        "export: {gguf: [F16], depths: [2, 4]}\n"
    )
    with pytest.raises(
        UserError, match=r"export\.depths ends with 4, but the pruned model has 3 blocks.*write \[\.\.\., 3\]"
    ):
        make_plan(Recipe.load(str(tmp_path / "r.yaml")), "float32", tmp_path)
    make_plan(Recipe.load(str(tmp_path / "r.yaml"), ["export.depths=[2, 3]"]), "float32", tmp_path)
