"""Training through rounded weights: what is measured is what the exported file holds, and a kill changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from compress.core.errors import UserError
from compress.core.stage import Context, Inputs, Progress
from compress.distill import stage
from compress.distill.config import DistillConfig
from compress.export.config import ExportConfig
from compress.export.gguf import write_gguf
from compress.export.imatrix import carried_imatrix
from compress.export.job import ExportJob
from compress.export.levels import LAYOUTS, gguf_levels
from compress.export.onnx import write_onnx
from compress.export.quantize import quantize
from compress.export.tensors import dequantize_nbits, integer_parts
from compress.modeling.blocks import drop_blocks
from compress.modeling.checkpoint import save_checkpoint
from compress.modeling.load import load_model, load_tokenizer
from compress.pipeline.recipe import Recipe
from compress.runtime.artifact_types import GGUF_TYPES, NEAREST
from compress.training import rounded, train
from safetensors.torch import load_file
from torch import Tensor

SEED, LENGTH = 7, 64
LORA: dict[str, Any] = {"kind": "lora", "rank": 4, "alpha": 12.0}
BASES = {  # rows of 64 fit blocks of 32 alone, those of 256 all
    "tied": {"blocks": 4, "hidden": 64, "heads": 2, "kv_heads": 1, "intermediate": 256, "seed": 2},
    "untied": {"blocks": 4, "hidden": 64, "heads": 2, "kv_heads": 2, "intermediate": 256, "seed": 2, "tied": False},
}


class World:
    """A base model, the same without one block and scaled behind it, and a data stage's folder."""

    def __init__(self, killer: Callable[[int], Progress], base: Path, folder: Path, talks: Path):
        self.killer, self.folder, self.base, self.runs = killer, folder, base, 0
        model = load_model(base)
        drop_blocks(model, [1])
        for block in model.model.layers[1:]:  # as healing by refit leaves them
            for linear in (block.self_attn.o_proj, block.mlp.down_proj):
                linear.weight.data *= 1.1
        save_checkpoint(model, load_tokenizer(base), folder / "pruned")
        self.inputs = Inputs(base, folder / "pruned", {"data": talks})

    def __call__(
        self, kind: str | None, out: Path | None = None, calls: int = 0, dtype: str = "float32", **options: Any
    ) -> dict[str, Any]:
        self.runs += 1
        self.out = out or self.folder / f"out{self.runs}"
        self.out.mkdir(exist_ok=True)
        plain = {"objective": "kd", "lr": 1e-2, "length": LENGTH, "max_steps": 4, "accumulate": 2, "select": "last"}
        plain |= {"eval_every": 3, "save_every": 2, "tune": LORA | {"quantize_as": kind} | options.pop("tune", {})}
        config = DistillConfig.model_validate(plain | options)
        return stage.run(config, self.inputs, self.out, Context(seed=SEED, dtype=dtype, progress=self.killer(calls)))


@pytest.fixture(scope="module")
def worlds(
    killer: Callable[[int], Progress],
    tiny: Callable[..., Path],
    talks: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, World]:
    return {
        name: World(killer, tiny(**options), tmp_path_factory.mktemp(name), talks) for name, options in BASES.items()
    }


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The weights that the latest measurement computed with, by the checkpoint's names."""
    found: dict[str, Tensor] = {}
    plain = train.DistillTrainer.measure

    def measure(trainer: Any, step: int) -> Any:
        figures = plain(trainer, step)
        model = trainer.decoder.model
        for path, module in model.named_modules():
            if isinstance(module, rounded.RoundedLayer):
                found[f"{path}.weight"] = module.weight_in_use.float().clone()
        found["model.embed_tokens.weight"] = model.model.embed_tokens.weight.detach().float().clone()
        found["lm_head.weight"] = model.lm_head.weight.detach().float().clone()
        return figures

    monkeypatch.setattr(train.DistillTrainer, "measure", measure)
    return found


def read_file(file: Path, heads: dict[str, int]) -> dict[str, Tensor]:
    """A llama's GGUF file by the checkpoint's names and with its order of rows, as the gguf package reads it."""
    parts = {
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    found = {}
    for tensor in gguf.GGUFReader(file).tensors:
        values = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        name = {"token_embd.weight": "model.embed_tokens.weight", "output.weight": "lm_head.weight"}.get(tensor.name)
        if tensor.name.startswith("blk."):
            _, block, part, _ = tensor.name.split(".")
            name = f"model.layers.{block}.{parts[part]}.weight" if part in parts else None
            if part in heads:  # llama.cpp has the two numbers that are turned together side by side
                values = values.view(heads[part], -1, 2, values.shape[-1]).transpose(1, 2).reshape(values.shape)
        if name is not None:
            found[name] = values
    found.setdefault("lm_head.weight", found["model.embed_tokens.weight"])
    return found


@pytest.mark.parametrize(
    ("which", "kind", "teacher", "dtype"),
    [
        ("tied", "Q4_K_M", "copy", "float32"),
        ("untied", "Q4_0", "copy", "float32"),
        ("tied", "IQ4_XS", "shared", "float32"),
        ("untied", "Q3_K_M", "shared", "float32"),
        ("tied", "Q4_K_S", "copy", "bfloat16"),
    ],
)
def test_the_gguf_file_holds_what_was_measured(
    worlds: dict[str, World], used: dict[str, Tensor], tmp_path: Path, which: str, kind: str, teacher: str, dtype: str
) -> None:
    """To the bit; in bfloat16 the measurement's weights are the file's in that type."""
    world = worlds[which]
    metrics = world(kind, teacher=teacher, dtype=dtype)
    assert metrics["quantized_as"] == kind
    write_gguf(world.out / "model", tmp_path / "m.gguf", kind, imatrix=carried_imatrix(world.out / "model"))
    held = read_file(tmp_path / "m.gguf", {"attn_q": 2, "attn_k": BASES[which]["kv_heads"]})
    assert used.keys() == held.keys() and len(held) == 3 * 7 + 2
    for name, values in held.items():
        assert torch.equal(used[name], values.to(getattr(torch, dtype)).float()), name
    # Without rounding they would be others, and the types of a mix are not one.
    floats = load_file(world.out / "model" / "model.safetensors")
    assert all(not torch.equal(floats[name].float(), held[name]) for name in floats if name in held)
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors} - {"F32"}
    assert len(kinds) > 1


def test_the_onnx_folder_holds_what_was_measured(
    worlds: dict[str, World], used: dict[str, Tensor], tmp_path: Path
) -> None:
    import onnx

    world = worlds["tied"]
    world("int4", teacher="shared")
    imatrix = carried_imatrix(world.out / "model")
    write_onnx(world.out / "model", tmp_path / "m", "int4", imatrix=imatrix)
    graph = onnx.load(str(tmp_path / "m" / "model.onnx")).graph
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    held = {}
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            settings = {a.name: a.i for a in node.attribute}
            parts = [stored[name] if name else None for name in integer_parts(node)]
            values = dequantize_nbits(parts, settings["bits"], settings["block_size"], settings["K"])
            held[node.name] = torch.from_numpy(values)
    layer = "model.layers.{}.{}.weight"
    names = {"/lm_head/MatMul": ["model.embed_tokens.weight"]}
    for block in range(3):
        attention = [layer.format(block, f"self_attn.{part}_proj") for part in "qkv"]
        names[f"/model/layers.{block}/attn/qkv_proj/MatMul"] = attention
        names[f"/model/layers.{block}/attn/o_proj/MatMul"] = [layer.format(block, "self_attn.o_proj")]
        for part in ("gate", "up", "down"):
            names[f"/model/layers.{block}/mlp/{part}_proj/MatMul"] = [layer.format(block, f"mlp.{part}_proj")]
    assert held.keys() == names.keys()
    for node, parts in names.items():
        assert torch.equal(held[node], torch.cat([used[name] for name in parts])), node


def test_a_killed_run_ends_with_the_same_bytes(worlds: dict[str, World]) -> None:
    """Killed before rounding begins, after a step whose scales were an earlier one's, and after one that found them."""
    world, options = worlds["tied"], {"max_steps": 8, "eval_every": 3, "save_every": 2, "tune": {"quantize_after": 0.4}}
    metrics = world("Q4_K_M", **options)
    whole, out = world.out, world.folder / "killed"
    for calls in (4, 4, 3):  # steps 2, 4 and 6 are saved; the first call tells where the run starts
        with pytest.raises(KeyboardInterrupt):
            world("Q4_K_M", out=out, calls=calls, **options)
    again = world("Q4_K_M", out=out, **options)
    files = [path.relative_to(whole) for path in sorted((whole / "model").rglob("*")) if path.is_file()]
    assert Path("model/importance/imatrix.safetensors") in files
    for file in [*files, Path("curves.jsonl")]:
        assert (out / file).read_bytes() == (whole / file).read_bytes(), file
    del metrics["seconds_training"], again["seconds_training"]
    assert again == metrics


def test_training_through_the_rounding_beats_rounding_afterwards(
    killer: Callable[[int], Progress], tiny: Callable[..., Path], talks: Path, tmp_path: Path
) -> None:
    """At the same rows, steps and seed; the held-out KL is that of the weights as the export rounds them."""
    base = tiny(blocks=4, hidden=256, heads=4, kv_heads=2, intermediate=256, seed=2)
    world, found = World(killer, base, tmp_path, talks), {}
    for after in (0.75, 0.999):  # the latter rounds only what is measured
        options = {"max_steps": 24, "eval_every": 12, "lr": 5e-3, "tune": {"quantize_after": after}}
        found[after] = world("Q3_K_S", **options)["last"]["eval_kl"]
    assert found[0.75] < 0.97 * found[0.999]


def test_the_gradient_is_that_of_the_sum_without_rounding() -> None:
    random = torch.Generator().manual_seed(0)
    inputs, a, b, weight = (
        torch.randn(size, generator=random, dtype=torch.float64, requires_grad=True)
        for size in ((2, 5, 8), (3, 8), (6, 3), (6, 8))
    )
    target = torch.randn(2, 5, 6, generator=random, dtype=torch.float64)
    change = 0.7 * b @ a
    straight = weight.detach().round() + change - change.detach()
    wanted = torch.autograd.grad((inputs @ straight.t() - target).square().sum(), [inputs, a, b])
    product: Any = rounded._Through.apply(inputs, a, b, weight.detach().round(), 0.7)
    for found, expected in zip(
        torch.autograd.grad((product - target).square().sum(), [inputs, a, b]), wanted, strict=True
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_the_nearest_values_are_those_that_the_blocks_allow(kind: gguf.GGMLQuantizationType) -> None:
    """Elementwise as near as what the quantizer chose from the same scales, and no other values than it may choose."""
    random = np.random.default_rng(0)
    weights = random.standard_normal((6, 512)).astype(np.float32)
    weights[1] *= 100
    weights[2, :256] = 0
    data = quantize(weights, kind, random.random(512).astype(np.float32))
    values = torch.from_numpy(np.array(gguf.dequantize(data, kind)))
    levels = gguf_levels(data, kind)
    torch.testing.assert_close(levels.nearest(values.clone()), values, rtol=1e-5, atol=1e-6)
    found, exact = levels.nearest(torch.from_numpy(weights.copy())), torch.from_numpy(weights)
    assert bool(((found - exact).abs() <= (values - exact).abs() + 1e-4 * exact.abs() + 1e-6).all())
    assert float((found - exact).norm()) > 1e-4
    other = levels.nearest(torch.linspace(-500, 500, 6 * 512).view(6, 512))  # beyond the range: its ends
    size = LAYOUTS[kind].group
    for groups in (found, other):
        assert max(len(set(g.tolist())) for g in groups.view(-1, size)) <= min(size, 2 ** round(np.log2(16)) * 16)
    assert float(other[0].abs().max()) < 50


def test_every_type_that_is_offered_is_rounded(worlds: dict[str, World]) -> None:
    """Each mix's types, fallbacks for short rows included, have a layout; those left out have types without one."""
    from compress.export.rounding import GgufRounder

    for kind in GGUF_TYPES:
        kinds = set(GgufRounder(worlds["tied"].inputs.model, kind, {}).kinds.values())
        plain = {gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16")}
        assert not kind.startswith("IQ2") or kind not in NEAREST
        if kind in NEAREST:
            assert kinds - plain <= set(LAYOUTS) and kinds & set(LAYOUTS), kind


def test_the_export_takes_the_matrix_that_the_checkpoint_was_trained_with(
    worlds: dict[str, World], tmp_path: Path
) -> None:
    world = worlds["tied"]
    world("Q4_0", max_steps=1)
    model: Any = None  # not looked at

    def weighed(checkpoint: Path, **options: Any) -> Any:
        config = ExportConfig(gguf=["Q4_0"], **options)
        return ExportJob(
            checkpoint, tmp_path, tmp_path, config, Context(), "m", Inputs(world.base, checkpoint)
        )._weighed(model)

    found, carried = weighed(world.out / "model"), carried_imatrix(world.out / "model")
    assert carried is not None and found.keys() == carried.keys() and len(carried) == 3 * 7
    assert all(np.array_equal(found[name], carried[name]) for name in carried)
    assert weighed(world.out / "model", imatrix=False) is None
    assert weighed(world.inputs.model) is None


RECIPE = {
    "name": "r",
    "model": "random:llama",
    "data": {"source": "magpie"},
    "distill": {"tune": {"kind": "lora", "quantize_as": "Q4_0"}},
    "export": {"gguf": ["Q4_0"]},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"export": {"gguf": ["Q8_0"], "onnx": ["int4"]}}, r"Q4_0 is not exported \(listed are Q8_0, int4\)"),
        ({"export": {"gguf": ["Q4_0"], "imatrix": False}}, "export.imatrix is false; remove that"),
        ({"sort": {"depths": [2, 4]}, "export": None}, "is changed by `sort:` before it is exported"),
        ({"distill": {"tune": {"kind": "lora", "quantize_as": "IQ3_S"}}}, "'IQ3_S'"),
        ({"distill": {"tune": {"kind": "lora", "quantize_as": "Q9"}}}, "'Q9'"),
        ({"distill": {"tune": {"kind": "full", "quantize_as": "Q4_0"}}}, "quantize_as"),
        (
            {"distill": {"tune": {"kind": "lora", "quantize_as": "Q4_0", "quantize_base": "nf4"}}},
            "not go with quantize_b",
        ),
        ({"distill": {"tune": {"kind": "lora", "quantize_as": "Q4_0", "dropout": 0.1}}}, "not go with dropout"),
        ({"distill": {"tune": {"kind": "lora", "quantize_as": "Q4_0", "train_head": True}}}, "not go with train_head"),
        (
            {"distill": {}, "sort": {"depths": [4], "tune": {"kind": "lora", "quantize_as": "Q4_0"}}, "export": None},
            "for distill alone",
        ),
    ],
)
def test_what_cannot_be_had_is_refused(changes: dict[str, Any], message: str) -> None:
    Recipe.from_dict(RECIPE)
    with pytest.raises(UserError, match=message) as caught:
        Recipe.from_dict({name: value for name, value in (RECIPE | changes).items() if value is not None})
    assert "has 1 problem" in str(caught.value)
