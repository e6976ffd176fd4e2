"""Checkpoint folders as people have them: read as the model they are, or refused in one line, by every command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from compress.cli.main import main
from compress.core.errors import UserError
from compress.core.stage import Progress
from compress.modeling import load as loading
from compress.modeling.load import load_config, load_model, load_tokenizer, resolve
from compress.modeling.source import ModelSource
from compress.modeling.weights import INDEX, count_parameters, weight_files
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

PARTS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def copy(tiny: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """copy(family, **options) -> a folder of one's own with a tiny checkpoint."""

    def make(family: str = "llama", **options: Any) -> Path:
        return Path(shutil.copytree(tiny(family, **options), tmp_path / "model"))

    return make


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def save(folder: Path, tensors: dict[str, torch.Tensor], name: str = "model.safetensors") -> None:
    save_file({k: v.clone().contiguous() for k, v in tensors.items()}, folder / name, metadata={"format": "pt"})


def edit(folder: Path, name: str = "config.json", drop: tuple[str, ...] = (), **values: Any) -> None:
    file = folder / name
    found = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({k: v for k, v in found.items() if k not in drop} | values))


def shard(folder: Path, parts: int = 2) -> None:
    tensors, where = weights(folder), {}
    (folder / "model.safetensors").unlink()
    for number in range(parts):
        name = f"model-{number + 1:05d}-of-{parts:05d}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[number::parts]}
        save(folder, part, name)
        where |= dict.fromkeys(part, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def arguments(command: str, folder: Path, place: Path) -> list[str]:
    """A command and what it needs to work on a checkpoint folder; what it makes goes to `place`."""
    recipe, text = place / "r.yaml", place / "t.txt"
    text.write_text("words " * 100)
    recipe.write_text(
        f"name: x\nmodel: {folder}\nprune: {{blocks: 1, heal: none, calibration: {{text: {text}, tokens: 64}}}}\n"
    )
    further = {
        "plan": [str(recipe)],
        "run": [str(recipe), "--runs", str(place / "runs")],
        "export": [str(folder), "--gguf", "F16", "--out", str(place / "b")],
        "eval": [str(folder), "--text", str(text)],
        "inspect": [str(folder)],
    }
    return [command, *further[command]]


def read(folder: Path, notes: Progress | None = None) -> Path:
    return resolve(str(folder), folder.parent / "cache", progress=notes)


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    return load_model(folder)(torch.arange(3, 40)[None]).logits


def test_a_plain_folder_is_used_where_it_lies(copy):
    folder = copy()
    assert read(folder) == folder
    shard(folder)
    assert read(folder) == folder


@pytest.mark.parametrize("sharded", [True, False])
def test_a_vendors_copy_of_the_weights_is_not_read(noted, copy, tmp_path, sharded):
    """Neither counted nor loaded nor exported, by any part of the package."""
    folder = copy("mistral")
    expected, count = logits(folder), count_parameters(folder)
    others = {name.replace("model.layers", "layers"): value for name, value in weights(folder).items()}
    if sharded:
        shard(folder)
    save(folder, others, "consolidated.safetensors")
    (folder / "consolidated.safetensors.index.json").write_text("{}")
    notes = noted()
    found = read(folder, notes)
    assert any("consolidated.safetensors is ignored" in text for text in notes.texts)
    assert found != folder and torch.equal(logits(found), expected) and count_parameters(found) == count
    assert {file.name for file in found.iterdir() if file.suffix == ".safetensors"} == {
        file.name for file in weight_files(folder)
    }
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(folder)])
    assert ended.value.code == 0


def test_the_index_decides_where_both_are_there(copy):
    folder = copy()
    expected = logits(folder)
    stale = {name: value + 1 for name, value in weights(folder).items()}
    shard(folder)
    save(folder, stale)
    assert torch.equal(logits(read(folder)), expected)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "lacks model-00002-of-00002.safetensors"),
        (lambda f: (f / INDEX).write_text("{"), "is not valid JSON"),
        (lambda f: (f / INDEX).write_text("[]"), "holds a JSON array"),
        (lambda f: (f / INDEX).write_text('{"weight_map": {}}'), "has no weight_map"),
        (lambda f: (f / INDEX).write_text('{"weight_map": {"a": "../x.safetensors"}}'), "is not the name of a"),
        (lambda f: (f / INDEX).unlink(), "has neither model.safetensors nor model.safetensors.index.json"),
        (
            lambda f: shutil.copy(f / "model-00001-of-00002.safetensors", f / "model-00002-of-00002.safetensors"),
            "is in both",
        ),
    ],
)
def test_a_damaged_index_is_one_line(copy, damage, message):
    folder = copy()
    shard(folder)
    damage(folder)
    with pytest.raises(UserError, match=message) as refused:
        read(folder)
    assert "\n" not in str(refused.value)


def drop(*names: str) -> Callable[[Path], None]:
    return lambda folder: save(folder, {k: v for k, v in weights(folder).items() if k not in names})


def add(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Callable[[Path], None]:
    return lambda folder: save(folder, weights(folder) | {name: torch.ones(shape, dtype=dtype)})


def without_block(number: int) -> Callable[[Path], None]:
    return lambda folder: save(folder, {k: v for k, v in weights(folder).items() if f"layers.{number}." not in k})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop("model.layers.2.mlp.up_proj.weight"), "no model.layers.2.mlp.up_proj.weight"),
        (drop("model.norm.weight"), "no model.norm.weight"),
        (add("model.layers.1.self_attn.q_norm.weight", 16), "self_attn.q_norm.weight, which a llama model"),
        (add("model.layers.0.self_attn.q_proj.bias", 64), "q_proj.bias, which a llama model with this configuration"),
        (add("mtp.head.weight", 4, 4), "mtp.head.weight, which a llama model"),
        (add("model.layers.0.self_attn.q_proj.lora_A.weight", 4, 64), "adapter that was saved unmerged"),
        (without_block(3), r"the weights have 3 blocks, but config.json says 4 \(num_hidden_layers\)"),
        (lambda f: edit(f, num_hidden_layers=3), "the weights have 4 blocks, but config.json says 3"),
        (lambda f: edit(f, num_hidden_layers=5), "the weights have 4 blocks, but config.json says 5"),
        (
            lambda f: edit(f, vocab_size=999),
            r"embed_tokens.weight has shape \[\d+, 64\], but config.json asks for \[999",
        ),
        (lambda f: edit(f, intermediate_size=64), "config.json asks for"),
        (lambda f: edit(f, num_hidden_layers="4"), "num_hidden_layers is '4', but must be a whole number"),
        (lambda f: edit(f, hidden_size=-1), "hidden_size is -1"),
        (lambda f: edit(f, hidden_act="notanact"), "no llama model can be built from this configuration: 'notanact'"),
        (lambda f: edit(f, model_type="mamba"), "of family 'mamba', which is not supported"),
        (add("model.norm.weight", 64, dtype=torch.int8), "has type I8, not float"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{"), "is not UTF-8 text"),
    ],
)
def test_weights_that_are_not_of_the_configuration_are_refused_before_any_work(copy, damage, message):
    folder = copy(tied=True)
    damage(folder)
    with pytest.raises(UserError, match=message) as refused:
        read(folder)
    assert "\n" not in str(refused.value)


def test_numbers_that_are_not_finite_are_named(copy):
    folder = copy()
    tensors = weights(folder)
    tensors["model.layers.1.mlp.down_proj.weight"][7, 3] = float("inf")
    save(folder, tensors)
    with pytest.raises(UserError, match=r"model.layers.1.mlp.down_proj.weight contains NaN or infinity"):
        load_model(read(folder))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_a_head_of_its_own_is_used_though_the_configuration_ties_it(noted, copy, family):
    folder = copy(family, tied=True)
    tensors = weights(folder)
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding + 0.5 * embedding.std() * torch.randn_like(embedding)
    save(folder, tensors)
    notes = noted()
    found = read(folder, notes)
    assert len([text for text in notes.texts if "lm_head.weight is used" in text]) == 1
    assert load_config(found).tie_word_embeddings is False
    model = load_model(found)
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    save(folder, tensors | {"lm_head.weight": embedding})  # the same matrix twice is one
    assert load_config(read(folder)).tie_word_embeddings is True


def test_no_head_where_the_configuration_has_one_is_refused_with_the_way_out(copy):
    folder = copy("qwen2", tied=True)
    edit(folder, drop=("tie_word_embeddings",))  # whose default is a head of its own
    with pytest.raises(UserError, match=r'add "tie_word_embeddings": true to config.json'):
        read(folder)
    edit(folder, tie_word_embeddings=True)
    assert read(folder) == folder


@pytest.mark.parametrize("count", [3, 6, 1])
def test_a_list_per_block_of_one_kind_is_given_the_length_of_the_blocks(noted, copy, count):
    folder = copy("qwen3")
    expected = logits(folder)
    edit(folder, layer_types=["full_attention"] * count)
    notes = noted()
    found = read(folder, notes)
    assert load_config(found).layer_types == ["full_attention"] * 4
    assert [f"has {count} entries for 4 blocks" in text for text in notes.texts] == [True]
    assert torch.equal(logits(found), expected)


@pytest.mark.parametrize("command", ["plan", "run", "export", "eval", "inspect"])
def test_a_list_per_block_that_cannot_be_told_is_one_line_in_every_command(copy, tmp_path, capfd, command):
    folder = copy("gemma3_text", layer_types=["sliding_attention", "full_attention"] * 2)
    edit(folder, layer_types=["sliding_attention", "full_attention"] * 3)
    with pytest.raises(SystemExit) as ended:
        main(arguments(command, folder, tmp_path))
    out, err = capfd.readouterr()
    told = " ".join((out if command == "inspect" else err).replace("│", " ").split())
    assert "layer_types has 6 differing entries for 4 blocks (num_hidden_layers)" in told
    assert ended.value.code == (0 if command == "inspect" else 2) and "Traceback" not in err


def test_records_of_another_cut_are_left_out(noted, copy):
    folder = copy()
    edit(folder, compress_kept_blocks=[0, 1, 2, 4, 5], compress_depths=[2, 5])
    notes = noted()
    config = load_config(read(folder, notes))
    assert not hasattr(config, "compress_kept_blocks") and not hasattr(config, "compress_depths")
    assert len(notes.texts) == 2


QUANTIZED = {
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq", "bits": 4},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "mxfp4": {"quant_method": "mxfp4"},
    "torchao": {"quant_method": "torchao"},
    "no name": {},
}


@pytest.mark.parametrize("command", ["run", "export", "plan", "eval"])
@pytest.mark.parametrize("method", [name for name in QUANTIZED if name != "no name"])
def test_quantized_checkpoints_are_refused_before_any_work(copy, tmp_path, capfd, method, command):
    folder = copy()
    edit(folder, quantization_config=QUANTIZED[method])
    with pytest.raises(SystemExit) as ended:
        main(arguments(command, folder, tmp_path))
    err = capfd.readouterr().err
    assert ended.value.code == 2 and f"is already quantized ({method}" in err and "use the float checkpoint" in err
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").glob("*/*-*"))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8, torch.int32])
def test_quantized_weights_without_a_word_in_the_configuration_are_refused(copy, dtype):
    folder = copy()
    tensors = weights(folder)
    name = "model.layers.0.mlp.up_proj.weight"
    save(folder, tensors | {name: torch.zeros(tensors[name].shape).to(dtype)})
    with pytest.raises(UserError, match="not float: the checkpoint is already quantized"):
        read(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_float_type_is_read(copy, dtype):
    folder = copy()
    save(folder, {name: value.to(dtype) for name, value in weights(folder).items()})
    assert read(folder) == folder and torch.isfinite(logits(folder)).all()


@pytest.fixture
def adapted(copy: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path, torch.Tensor]:
    """(base, adapter, logits of the two together)."""
    base = copy(tied=False)
    settings = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model: Any = get_peft_model(load_model(base), settings)
    model.save_pretrained(str(tmp_path / "adapter"))
    with torch.no_grad():
        return base, tmp_path / "adapter", model(torch.arange(3, 40)[None]).logits


def test_an_adapter_alone_is_merged_into_its_base(noted, adapted, tmp_path):
    base, adapter, expected = adapted
    notes = noted()
    edit(adapter, "adapter_config.json", base_model_name_or_path="model")  # beside the adapter's folder
    found = resolve(str(adapter), tmp_path / "cache", progress=notes)
    assert any("merging the adapter adapter into its base model" in text for text in notes.texts)
    assert torch.allclose(logits(found), expected, atol=1e-4)
    assert not torch.allclose(logits(base), expected, atol=1e-2)
    assert not (found / "adapter_config.json").exists()
    vocabularies = [cast(Any, load_tokenizer(folder)).get_vocab() for folder in (found, base)]
    assert vocabularies[0] == vocabularies[1]
    again = noted()
    assert resolve(str(adapter), tmp_path / "cache", progress=again) == found and not again.texts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a: edit(a, "adapter_config.json", base_model_name_or_path="nowhere"),
            "'nowhere' was not found; correct",
        ),
        (lambda a: edit(a, "adapter_config.json", base_model_name_or_path=None), "names no base model"),
        (lambda a: (a / "adapter_config.json").write_text("{"), "is not valid JSON"),
        (lambda a: edit(a, "adapter_config.json", peft_type="PROMPT_TUNING"), "cannot be merged"),
        (lambda a: (a / "adapter_model.safetensors").rename(a / "adapter_model.bin"), "only safetensors are read"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_one_line(adapted, tmp_path, change, message):
    _, adapter, _ = adapted
    change(adapter)
    with pytest.raises(UserError, match=message):
        resolve(str(adapter), tmp_path / "cache")


def test_an_adapter_beside_a_model_is_not_attached(noted, adapted):
    base, adapter, together = adapted
    expected = logits(base)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, base / name)
    notes = noted()
    found = read(base, notes)
    assert any("is not applied" in text for text in notes.texts)
    assert torch.equal(logits(found), expected) and not torch.allclose(expected, together, atol=1e-2)


TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.mark.parametrize(
    ("file", "value"),
    [
        ("tokenizer_config.json", TEMPLATE),
        ("tokenizer_config.json", [{"name": "tool_use", "template": "T"}, {"name": "default", "template": TEMPLATE}]),
        ("tokenizer_config.json", {"default": TEMPLATE, "tool_use": "T"}),
        ("chat_template.json", TEMPLATE),
    ],
)
def test_a_chat_template_is_found_wherever_it_stands(copy, file, value):
    folder = copy()
    (folder / "chat_template.jinja").unlink()
    edit(folder, "tokenizer_config.json", drop=("chat_template",))
    edit(folder, file, chat_template=value)
    found = read(folder)
    assert (found / "chat_template.jinja").read_text() == TEMPLATE
    template = load_tokenizer(found).chat_template
    assert template == TEMPLATE if isinstance(value, str) else template == {"default": TEMPLATE, "tool_use": "T"}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([{"name": "tool_use", "template": "T"}], "chat templates called tool_use and none called default"),
        (7, "is neither a text nor a list"),
        ([{"name": "../x", "template": "T"}, {"name": "default", "template": "T"}], "cannot be a file's name"),
    ],
)
def test_a_chat_template_that_is_none_is_one_line(copy, value, message):
    folder = copy()
    (folder / "chat_template.jinja").unlink()
    edit(folder, "tokenizer_config.json", chat_template=value)
    with pytest.raises(UserError, match=message):
        read(folder)


def test_only_the_models_own_files_are_downloaded(copy, monkeypatch, tmp_path):
    """A Hub repository with a vendor's copy, an ONNX folder and pickled weights."""
    remote = copy("mistral")
    shard(remote)
    save(remote, {"layers.0.wq": torch.ones(2, 2)}, "consolidated.safetensors")
    (remote / "pytorch_model.bin").write_bytes(b"no")
    (remote / "onnx").mkdir()
    (remote / "onnx" / "config.json").write_text("{}")
    local, asked = tmp_path / "hub", []

    def snapshot_download(repository: str, revision: str, allow_patterns: list[str], ignore_patterns: Any) -> str:
        from huggingface_hub.utils import filter_repo_objects

        names = [file.relative_to(remote).as_posix() for file in remote.rglob("*") if file.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            asked.append(name)
            (local / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(remote / name, local / name)
        return str(local)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("compress.modeling.source.hub_commit", lambda source: "0" * 40)
    folder = loading._download(ModelSource("hub", "owner/name"))
    assert "consolidated.safetensors" not in asked and "pytorch_model.bin" not in asked
    assert not [name for name in asked if "/" in name]
    assert torch.equal(logits(folder), logits(read(remote)))
