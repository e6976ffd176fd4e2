"""Merging: mergekit's results against formulas, what is refused and how, and which model goes on."""

from __future__ import annotations

import json
import logging
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compress.core.errors import UserError
from compress.core.stage import WORK, Context
from compress.merge import bridge, stage
from compress.merge.config import MergeConfig
from compress.modeling.blocks import drop_blocks
from compress.modeling.checkpoint import save_checkpoint
from compress.modeling.load import load_model, load_tokenizer
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

SIZES: dict[str, Any] = {"blocks": 3, "hidden": 32, "heads": 2, "kv_heads": 1, "intermediate": 48}
WEIGHT = {"weight": 1.0}
DIVERGED = "model.layers.0.mlp.down_proj.weight"


def section(method: str, names: list[str] | None = None, **options: Any) -> MergeConfig:
    config = MergeConfig.model_validate({"method": method} | options)
    return config.among(names) if names else config


def tensors(folder: Path) -> dict[str, Tensor]:
    files = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    return {name: tensor for file in files for name, tensor in file.items()}


def shifted(source: Path, folder: Path, seed: int, scale: float = 0.05, dtype: torch.dtype | None = None) -> Path:
    """The checkpoint with noise in every tensor, as if it had been trained on."""
    shutil.copytree(source, folder)
    draw = torch.Generator().manual_seed(seed)
    moved = {n: t + scale * torch.randn(t.shape, generator=draw) for n, t in sorted(tensors(source).items())}
    save_file({n: t.to(dtype or t.dtype) for n, t in moved.items()}, folder / "model.safetensors", {"format": "pt"})
    if dtype is not None:
        change_json(folder / "config.json", dtype=str(dtype).removeprefix("torch."))
    return folder


def change_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values, indent=2) + "\n")


def content(folder: Path) -> dict[str, bytes]:
    files = [file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file()]
    return {str(file): (folder / file).read_bytes() for file in files if WORK not in file.parts}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def models(request: pytest.FixtureRequest, tiny: Callable[..., Path], tmp_path_factory: Any) -> dict[str, Path]:
    """A start, pruned from four blocks, and three models trained from it; tied or not."""
    root = tmp_path_factory.mktemp("merge")
    base = tiny(**SIZES | {"blocks": 4, "tied": request.param})
    model = load_model(base)
    drop_blocks(model, [1])
    save_checkpoint(model, load_tokenizer(base), root / "start")
    found = {name: shifted(root / "start", root / name, seed) for seed, name in enumerate("abc")}
    return {**found, "start": root / "start"}


def merge(models: dict[str, Path], out: Path, config: MergeConfig, seed: int = 7) -> dict[str, Tensor]:
    stage.merge_checkpoints(config, models, out, Context(seed=seed))
    return tensors(out)


def slerp(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    """Shoemake's formula over a whole tensor, in float64; linear between nearly parallel tensors."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    cosine = float((x * y).sum() / (np.linalg.norm(x) * np.linalg.norm(y)))
    if abs(cosine) > 0.9995:
        return (1 - t) * x + t * y
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * x + math.sin(t * angle) * y) / math.sin(angle)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_is_the_formula_tensor_by_tensor(models: dict[str, Path], tmp_path: Path, t: float) -> None:
    found = merge(models, tmp_path / "m", section("slerp", ["a", "b"], parameters={"t": t}))
    a, b = tensors(models["a"]), tensors(models["b"])
    assert found.keys() == a.keys() and ("lm_head.weight" in found) == ("lm_head.weight" in a)
    for name, tensor in found.items():
        wanted = slerp(a[name].numpy(), b[name].numpy(), t)
        np.testing.assert_allclose(tensor.numpy(), wanted, rtol=0, atol=1e-6, err_msg=name)


def test_linear_is_the_weighted_mean_and_parameters_may_be_each_model_s(
    models: dict[str, Path], tmp_path: Path
) -> None:
    weights = {"b": 3.0, "a": 1.0, "c": 0.5}
    entries = [{"model": name, "parameters": {"weight": weight}} for name, weight in weights.items()]
    found = merge(models, tmp_path / "m", section("linear", models=entries))
    parts = {name: tensors(models[name]) for name in weights}
    for name, tensor in found.items():
        wanted = sum(weight * parts[model][name].double() for model, weight in weights.items()) / 4.5
        torch.testing.assert_close(tensor.double(), wanted, rtol=0, atol=1e-6)


def test_gradients_and_filters_are_mergekit_s(models: dict[str, Path], tmp_path: Path) -> None:
    """From the first block to the last t goes from 0 to 1, but for the MLPs; all else is halfway."""
    t = [{"filter": "mlp", "value": 0.25}, {"filter": "model.layers", "value": [0, 1]}, {"value": 0.5}]
    found = merge(models, tmp_path / "m", section("slerp", ["a", "b"], parameters={"t": t}))
    a, b = tensors(models["a"]), tensors(models["b"])
    for name, at in (
        ("model.layers.0.self_attn.q_proj.weight", 0.0),
        ("model.layers.1.self_attn.q_proj.weight", 0.5),
        ("model.layers.2.self_attn.q_proj.weight", 1.0),
        ("model.layers.2.mlp.up_proj.weight", 0.25),
        ("model.norm.weight", 0.5),
    ):
        np.testing.assert_allclose(found[name].numpy(), slerp(a[name].numpy(), b[name].numpy(), at), atol=1e-6)


def test_task_arithmetic_starts_from_the_model_before_the_variants(models: dict[str, Path], tmp_path: Path) -> None:
    found = merge(models, tmp_path / "m", section("task_arithmetic", ["a", "b"], parameters={"weight": 0.7}))
    start, a, b = (tensors(models[name]) for name in ("start", "a", "b"))
    for name, tensor in found.items():
        wanted = start[name] + 0.7 * (a[name] - start[name]) + 0.7 * (b[name] - start[name])
        torch.testing.assert_close(tensor, wanted, rtol=0, atol=1e-6)


def test_ties_without_trimming_is_the_mean_of_the_changes_that_agree(models: dict[str, Path], tmp_path: Path) -> None:
    config = section("ties", ["a", "b"], parameters=WEIGHT | {"density": 1.0}, base_model="start")
    found = merge(models, tmp_path / "m", config)
    start, a, b = (tensors(models[name]) for name in ("start", "a", "b"))
    for name, tensor in found.items():
        changes = torch.stack([a[name] - start[name], b[name] - start[name]]).double()
        elected = torch.where(changes.sum(0) >= 0, 1.0, -1.0)
        agree = changes.sign() == elected
        wanted = start[name] + (changes * agree).sum(0) / agree.sum(0).clamp(min=1)
        torch.testing.assert_close(tensor.double(), wanted, rtol=0, atol=1e-6)


def test_methods_that_draw_take_the_seed_and_leave_the_generators_alone(
    models: dict[str, Path], tmp_path: Path
) -> None:
    config = section("dare_ties", ["a", "b"], parameters={"weight": 0.5, "density": 0.5})
    torch.manual_seed(1)
    state, other, third = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
    found = [content_of_merge(models, tmp_path / str(i), config, seed) for i, seed in enumerate((3, 3, 4))]
    assert found[0] == found[1] != found[2]
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == other
    assert repr(np.random.get_state()) == third
    start, m = tensors(models["start"]), tensors(tmp_path / "0")
    changed = [m[name] - start[name] for name in m]
    untouched = sum(int((change == 0).sum()) for change in changed) / sum(change.numel() for change in changed)
    assert 0.2 < untouched < 0.5  # a quarter is dropped from both, and of what is opposed one side is


def content_of_merge(models: dict[str, Path], out: Path, config: MergeConfig, seed: int) -> dict[str, bytes]:
    merge(models, out, config, seed)
    return content(out)


def test_model_stock_lies_between_the_start_and_the_mean(models: dict[str, Path], tmp_path: Path) -> None:
    """Its share t follows from the mean cosine between the changes (arXiv 2403.19522)."""
    found = merge(models, tmp_path / "m", section("model_stock", ["a", "b", "c"]))
    start, *trained = (tensors(models[name]) for name in ("start", "a", "b", "c"))
    for name, tensor in found.items():
        changes = [(part[name] - start[name]).double().flatten() for part in trained]
        pairs = [(0, 1), (0, 2), (1, 2)]
        cosine = sum(float(changes[i] @ changes[j] / (changes[i].norm() * changes[j].norm())) for i, j in pairs) / 3
        t = 3 * cosine / (1 + 2 * cosine)
        wanted = start[name].double() + t * torch.stack(changes).mean(0).reshape(tensor.shape)
        torch.testing.assert_close(tensor.double(), wanted, rtol=0, atol=1e-6)


def test_karcher_of_two_is_the_middle_of_the_arc(models: dict[str, Path], tmp_path: Path) -> None:
    found = merge(models, tmp_path / "m", section("karcher", ["a", "b"]))
    a, b = tensors(models["a"]), tensors(models["b"])
    for name, tensor in found.items():
        x, y = a[name].double(), b[name].double()
        middle = x / x.norm() + y / y.norm()
        wanted = (x.norm() + y.norm()) / 2 * middle / middle.norm()
        torch.testing.assert_close(tensor.double(), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_merged_with_itself_is_itself(models: dict[str, Path], tmp_path: Path, dtype: torch.dtype) -> None:
    one = shifted(models["a"], tmp_path / "one", 5, dtype=dtype)
    shutil.copytree(one, tmp_path / "two")
    pair = {"one": one, "two": tmp_path / "two"}
    merge(pair, tmp_path / "m", section("linear", ["one", "two"], parameters=WEIGHT))
    assert content(tmp_path / "m") == content(one)  # weights, configuration, tokenizer: every byte


def test_the_result_is_a_checkpoint_of_the_pruned_model(models: dict[str, Path], tmp_path: Path) -> None:
    merge(models, tmp_path / "m", section("slerp", ["a", "b"], parameters={"t": 0.5}, out_dtype="bfloat16"))
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (config["compress_kept_blocks"], config["dtype"]) == ([0, 2, 3], "bfloat16")
    assert {tensor.dtype for tensor in tensors(tmp_path / "m").values()} == {torch.bfloat16}
    assert content(tmp_path / "m").keys() == content(models["a"]).keys()
    assert not any(str(tmp_path).encode() in data for data in content(tmp_path / "m").values())
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    tied = json.loads((models["a"] / "config.json").read_text())["tie_word_embeddings"]
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert torch.isfinite(model(torch.arange(3, 20)[None]).logits).all()


def test_nothing_is_printed_and_logging_is_as_before(
    models: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = list(logging.getLogger().handlers)
    merge(models, tmp_path / "m", section("model_stock", ["a", "b"]))
    assert capfd.readouterr() == ("", "") and logging.getLogger().handlers == before
    assert bridge.find_method("linear").spec.name == "linear"


def broken(folder: Path, name: str | None, change: Callable[[Tensor], Tensor | None]) -> None:
    parts = tensors(folder)
    changed = change(parts.pop(name)) if name else None
    save_file(parts | ({name: changed} if name and changed is not None else {}), folder / "model.safetensors")


def bad_tokenizer(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((folder / "tokenizer.json").read_text())
    change(values)
    (folder / "tokenizer.json").write_text(json.dumps(values))


DIFFERENT: dict[str, tuple[Callable[[Path], object], str]] = {
    "blocks": (
        lambda folder: change_json(folder / "config.json", compress_kept_blocks=[0, 1, 3]),
        r"the list of kept blocks is \[0, 2, 3\] in a and \[0, 1, 3\] in b",
    ),
    "configuration": (
        lambda folder: change_json(folder / "config.json", rms_norm_eps=0.5),
        r"rms_norm_eps in config\.json is 1e-06 in a and 0\.5 in b",
    ),
    "missing": (
        lambda folder: broken(folder, DIVERGED, lambda _: None),
        "the tensor .*down_proj.weight is present in a and missing in b",
    ),
    "shape": (
        lambda folder: broken(folder, DIVERGED, lambda t: t[:, :-1].contiguous()),
        r"the shape of .*0\.mlp\.down_proj\.weight is \[32, 48\] in a and \[32, 47\] in b",
    ),
    "type": (
        lambda folder: broken(folder, DIVERGED, lambda t: t.half()),
        r"the type of .* is F32 in a and F16 in",
    ),
    "token": (
        lambda folder: bad_tokenizer(folder, lambda v: v["model"]["vocab"].update({"!": 4, '"': 3})),
        "the id of token '!' is 3 in a and 4 in b",
    ),
    "one token more": (
        lambda folder: bad_tokenizer(folder, lambda v: v["model"]["vocab"].update({"zzz": 9999})),
        "the id of token 'zzz' is missing in a and 9999 in b",
    ),
    "tokenizer": (
        lambda folder: bad_tokenizer(folder, lambda v: v.update(normalizer={"type": "Lowercase"})),
        r"'normalizer' in tokenizer\.json is .* in a and \{\"type\": \"Lowercase\"\} in b",
    ),
    "no tokenizer": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        "tokenizer.json is present in a and missing",
    ),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_models_that_differ_are_refused(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    shutil.copytree(models["b"], tmp_path / "b")
    change, message = DIFFERENT[name]
    change(tmp_path / "b")
    with pytest.raises(UserError, match=f"a and b cannot be merged: {message}"):
        merge(models | {"b": tmp_path / "b"}, tmp_path / "m", section("linear", ["a", "b"], parameters=WEIGHT))
    assert not (tmp_path / "m").exists()


def test_what_cannot_be_read_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(models["b"], tmp_path / "b")
    changed = models | {"b": tmp_path / "b"}
    config = section("linear", ["a", "b"], parameters=WEIGHT)
    data = (tmp_path / "b" / "model.safetensors").read_bytes()
    (tmp_path / "b" / "model.safetensors").write_bytes(data[:-9])
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        merge(changed, tmp_path / "m", config)
    (tmp_path / "b" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no \.safetensors files"):
        merge(changed, tmp_path / "m", config)
    (tmp_path / "b" / "tokenizer.json").write_text("{")
    (tmp_path / "b" / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=r"tokenizer\.json is not valid JSON"):
        merge(changed, tmp_path / "m", config)


def test_types_may_differ_where_the_recipe_says_what_to_save(models: dict[str, Path], tmp_path: Path) -> None:
    half = shifted(models["start"], tmp_path / "half", 1, dtype=torch.float16)
    parts = tensors(half)
    save_file(parts | {DIVERGED: parts[DIVERGED].float()}, half / "model.safetensors")
    pair = {"half": half, "a": models["a"]}
    with pytest.raises(UserError, match=r"half has tensors of several types \(F16, F32\); set merge\.out_dtype"):
        merge(pair, tmp_path / "m", section("linear", ["half", "a"], parameters=WEIGHT))
    found = merge(pair, tmp_path / "m", section("linear", ["half", "a"], parameters=WEIGHT, out_dtype="float16"))
    wanted = ((parts[DIVERGED].float() + tensors(models["a"])[DIVERGED]) / 2).half()
    assert torch.equal(found[DIVERGED], wanted)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "float16"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "slurp"}, "merge.method: mergekit has no method 'slurp'; did you mean 'slerp'"),
        ({"method": "slerp"}, r"slerp needs t, such as parameters: \{t: 0\.5\}"),
        ({"method": "ties"}, r"ties needs weight for a, b, such as parameters: \{weight: 1\.0\}"),
        ({"method": "slerp", "parameters": {"tt": 0.5}}, "slerp has no parameter 'tt'; did you mean 't'"),
        ({"method": "arcee_fusion", "parameters": {"t": 0.5}}, "arcee_fusion has no parameter 't'; it has none"),
        ({"method": "slerp", "parameters": {"t": "much"}}, r"merge\.parameters\.t: 'much' is not of type float"),
        ({"method": "slerp", "parameters": {"t": {"value": [0, "x"]}}}, "'x' is not of type float"),
        ({"method": "linear", "parameters": WEIGHT, "base_model": "start"}, "linear takes no base model"),
        ({"method": "slerp", "parameters": {"t": 0.5}, "base_model": "start"}, "requires exactly 2 inputs; got 3"),
        (
            {"method": "passthrough", "parameters": {"scale": 1.0}},
            r"passthrough cannot merge a, b: .*at most 1|exactly 1",
        ),
        (
            {"method": "slerp", "models": [{"model": "a", "parameters": {"t": 1}}, {"model": "b"}]},
            "t cannot be set per model",
        ),
        (
            {
                "method": "ties",
                "base_model": "a",
                "parameters": WEIGHT,
                "models": [{"model": "a", "parameters": {"density": 0.5}}, {"model": "b"}],
            },
            r"models\.0\.parameters: ties takes no density for the base model; remove it",
        ),
        (
            {"method": "model_stock", "models": [{"model": "a"}]},
            "model_stock cannot merge a, and start as base_model: .*3",
        ),
    ],
)
def test_what_mergekit_would_not_do_is_refused_before_anything_is_trained(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        stage.check(MergeConfig.model_validate(options).among(["a", "b"]), Path(), Context())


def test_every_method_of_mergekit_is_taken() -> None:
    from mergekit.merge_methods import registered_methods

    values = {"t": 0.5, "weight": 1.0, "scale": 1.0}
    for method in registered_methods():
        needed = {p.name: values[p.name] for p in method.spec.parameters if p.required}
        names = {"passthrough": ["a"]}.get(method.spec.name, ["a", "b"])
        stage.check(section(method.spec.name, names, parameters=needed), Path(), Context())


def test_what_fails_in_mergekit_is_one_message(models: dict[str, Path], tmp_path: Path) -> None:
    config = section("della", ["a", "b"], parameters=WEIGHT | {"density": 0.9, "epsilon": 0.3})
    with pytest.raises(UserError, match="merge: mergekit's della failed: Epsilon must be chosen such that density"):
        merge(models, tmp_path / "m", config)
    with pytest.raises(UserError, match="ties needs a base model"):
        merge({"a": models["a"], "b": models["b"]}, tmp_path / "m", section("ties", ["a", "b"], parameters=WEIGHT))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": [{"model": "a"}, {"model": "a"}]}, "'a' is named twice"),
        ({"models": []}, "at least 1 item"),
        ({"select": "beast"}, "'best' or 'merge'"),
    ],
)
def test_sections_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        section("slerp", **options)
