"""The export stage: whole bundles, resuming, importance matrices, the real model."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any, cast

import compress.export.artifacts as artifacts
import numpy as np
import pytest
import torch
from compress.core.errors import UserError
from compress.core.stage import Context, Inputs
from compress.data.chat import Encoded
from compress.data.packing import pack
from compress.data.rows import Row, write_rows
from compress.export.bundle import settle_tokenizer
from compress.export.card import optimum_runs
from compress.export.config import ExportConfig
from compress.export.imatrix import collect
from compress.export.stage import export_checkpoint, run
from compress.export.verify import KL_LIMITS
from compress.modeling.blocks import drop_blocks
from compress.modeling.checkpoint import save_checkpoint
from compress.modeling.load import load_model, load_tokenizer
from compress.runtime.bundle import read_bundle
from compress.runtime.open import open_engine
from pydantic import ValidationError

TYPES = {"gguf": ["F16", "Q8_0", "Q4_0", "Q4_K_M", "Q6_K"], "onnx": ["int4", "int8", "fp32"]}
VERIFY = {"tokens": 32, "window": 32}


def config(**values: Any) -> ExportConfig:
    return ExportConfig.model_validate({"verify": VERIFY, "threads": 1} | values)


@pytest.fixture(scope="module")
def exported(shaken, builder_here, tmp_path_factory) -> Path:
    """A bundle of every type, made once: to read from."""
    bundle = tmp_path_factory.mktemp("exported") / "bundle"
    with builder_here():
        export_checkpoint(shaken(tied=False), bundle, config(**TYPES), Context(seed=7), name="tiny")
    return bundle


def test_a_bundle_holds_every_type_verified(exported):
    manifest = read_bundle(exported, hashes=True)
    assert [a.role for a in manifest.artifacts] == [f"gguf-{t}" for t in TYPES["gguf"]] + [
        f"onnx-{t}" for t in TYPES["onnx"]
    ]
    assert (manifest.name, manifest.family, manifest.depths, manifest.kept_blocks) == (
        "tiny",
        "llama",
        [4],
        [*range(4)],
    )
    for artifact in manifest.artifacts:
        found = artifact.verification
        assert found.positions == 32 and found.kl < KL_LIMITS[artifact.type]
        assert found.perplexity == pytest.approx(found.checkpoint_perplexity, rel=0.5)
        path = exported / artifact.path
        files = [path] if path.is_file() else list(path.iterdir())
        assert artifact.bytes == sum(file.stat().st_size for file in files)
        open_engine(path, threads=1, context=64).close()
    sizes = {a.type: a.bits_per_weight for a in manifest.artifacts}
    assert sizes["Q4_0"] < sizes["Q4_K_M"] < sizes["Q6_K"] <= sizes["Q8_0"] < sizes["F16"] < sizes["fp32"]
    assert sizes["int4"] < sizes["int8"]
    listed = {entry.path for entry in manifest.files}
    assert listed == {str(f.relative_to(exported)) for f in exported.rglob("*") if f.is_file()} - {
        "manifest.json",
        "README.md",  # which a run completes when it has measured the files' rivals
    }
    assert listed >= {"Modelfile", "tokenizer.json", "config.json", "chat_template.jinja"}
    assert [path.name for path in exported.parent.iterdir()] == ["bundle"]
    assert str(exported.parent) not in (exported / "manifest.json").read_text() + (exported / "README.md").read_text()


def test_the_model_card_says_how_to_run_it(exported):
    card = (exported / "README.md").read_text()
    assert 'llama-cli -m gguf/tiny-F16.gguf -p "Hello"' in card
    assert 'subfolder="onnx/int4", file_name="model.onnx"' in card and "\n    compress serve .\n" in card
    assert "ollama create tiny -f Modelfile" in card and 'og.Model("onnx/int4")' in card
    for artifact in read_bundle(exported).artifacts:
        assert f"| `{artifact.path}` | {artifact.type} |" in card
    ends = 'PARAMETER stop "<|endoftext|>"\nPARAMETER stop "<|im_end|>"\n'
    assert (exported / "Modelfile").read_text() == "FROM ./gguf/tiny-F16.gguf\n" + ends


@pytest.mark.parametrize(
    ("changes", "runs"),
    [
        ({}, True),
        ({"head_dim": 16}, True),
        ({"head_dim": 32}, False),
        ({"head_dim": 32, "model_type": "gemma3_text"}, True),
        ({"model_type": "phi3"}, False),
        ({"model_type": "phi3", "num_key_value_heads": 4}, True),
    ],
)
def test_optimum_is_named_where_its_cache_fits(changes, runs):
    plain = {"model_type": "qwen3", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    assert optimum_runs(plain | changes) is runs


def test_older_libraries_can_read_the_tokenizers_settings(tiny, tmp_path):
    """The older names mean the same to transformers 5; what another class or a key says stays."""
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(tiny() / name, tmp_path / name)
    file = tmp_path / "tokenizer_config.json"
    values = json.loads((tiny() / file.name).read_text())
    assert values["tokenizer_class"] == "TokenizersBackend"
    file.write_text(json.dumps(values | {"extra_special_tokens": ["<one>", "<two>"], "is_local": True}))
    text = "Hello <one>, été"
    before: Any = load_tokenizer(tmp_path)
    settle_tokenizer(file)
    settled, after = json.loads(file.read_text()), cast(Any, load_tokenizer(tmp_path))
    assert settled == {key: value for key, value in values.items() if key != "extra_special_tokens"} | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<one>", "<two>"],
        "model_input_names": ["input_ids", "attention_mask"],
    }
    assert dict(after(text)) == {key: before(text)[key] for key in ("input_ids", "attention_mask")}
    assert after.extra_special_tokens == before.extra_special_tokens == ["<one>", "<two>"]
    file.write_text('{"tokenizer_class": "GemmaTokenizer", "model_input_names": ["input_ids"]}')
    settle_tokenizer(file)
    assert json.loads(file.read_text()) == {"tokenizer_class": "GemmaTokenizer", "model_input_names": ["input_ids"]}


def test_reading_a_bundle_finds_what_changed(shaken, tmp_path, context, monkeypatch):
    export_checkpoint(shaken(), tmp_path / "b", config(gguf=["Q8_0"]), context)
    (file,) = (tmp_path / "b" / "gguf").iterdir()
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"Q8_0\.gguf has changed"):
        read_bundle(tmp_path / "b")
    monkeypatch.setattr("compress.runtime.bundle.SMALL", len(data) - 1)  # as the files of real models are larger
    read_bundle(tmp_path / "b")  # sizes alone are as they were
    with pytest.raises(UserError, match=r"Q8_0\.gguf has changed since the bundle was made"):
        read_bundle(tmp_path / "b", hashes=True)
    file.write_bytes(data[:-1])
    with pytest.raises(UserError, match="has changed"):
        read_bundle(tmp_path / "b")
    file.unlink()
    with pytest.raises(UserError, match="lacks gguf/"):
        read_bundle(tmp_path / "b")
    (tmp_path / "b" / "manifest.json").write_text('{"schema_version": 1}')
    with pytest.raises(UserError, match="is not a bundle's manifest"):
        read_bundle(tmp_path / "b")
    with pytest.raises(UserError, match="it has no manifest"):
        read_bundle(tmp_path)


@pytest.fixture
def inputs(shaken, tmp_path) -> Inputs:
    """An unpruned model, one with three blocks, and a data stage of plain texts."""
    model = load_model(shaken())
    drop_blocks(model, [2])
    save_checkpoint(model, load_tokenizer(shaken()), tmp_path / "prune-1" / "model")
    data = tmp_path / "data-2"
    data.mkdir()
    text = "the people of that place would make more sound than water, so they said: {} times {} was how many? "
    rows = [Row(i, "heldout" if i == 5 else "train", text=text.format(i, i + 7) * 3) for i in range(6)]
    write_rows(data, rows)
    return Inputs(shaken(), tmp_path / "prune-1" / "model", {"data": data}, name="tiny-base")


def test_a_killed_stage_goes_on_with_what_was_verified(inputs, tmp_path, context, inline_builder, monkeypatch):
    wanted = config(gguf=["Q4_0", "F16"], onnx=["int4"], imatrix_tokens=128)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    run(wanted, inputs, tmp_path / "whole", context)
    written: list[str] = []
    write = artifacts.write_gguf

    def counted(*args: Any, **options: Any) -> Any:
        written.append(args[2])
        return write(*args, **options)

    def killed(*_args: Any, **_options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(artifacts, "write_gguf", counted)
    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "write_onnx", killed)
        with pytest.raises(KeyboardInterrupt):
            run(wanted, inputs, tmp_path / "killed", context)
    run(wanted, inputs, tmp_path / "killed", context)
    assert written == ["Q4_0", "F16"]
    files = [f.relative_to(tmp_path / "whole") for f in (tmp_path / "whole" / "bundle").rglob("*") if f.is_file()]
    assert len(files) > 10
    for file in files:
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    manifest = read_bundle(tmp_path / "killed" / "bundle", hashes=True)
    assert manifest.importance_matrix and manifest.kept_blocks == [0, 1, 3]
    assert manifest.provenance == {
        "kept_recorded": True,
        "stages": {"data": "2"},
        "base": "tiny-base",
        "base_blocks": 4,
    }
    assert (
        manifest.name == "tiny-base-3L"
        and "3 of its blocks were kept" in (tmp_path / "killed/bundle/README.md").read_text()
    )


def test_importance_is_the_mean_square_of_each_input(shaken):
    """Against one row at a time, without padding or packing, in float64."""
    model = load_model(shaken("phi3"))
    rows = [[(7 * i + k) % 450 for i in range(length)] for k, length in enumerate((9, 30, 17, 4))]
    batches = pack([Encoded(ids, [True] * len(ids)) for ids in rows], 32, 2, pad_id=0)
    before = [len(m._forward_pre_hooks) for m in model.modules()]
    found = collect(model, batches)
    assert [len(m._forward_pre_hooks) for m in model.modules()] == before
    seen: dict[str, list[torch.Tensor]] = defaultdict(list)
    names = {"qkv_proj": "attn_qkv", "o_proj": "attn_output", "gate_up_proj": "ffn_up", "down_proj": "ffn_down"}
    for number, block in enumerate(model.model.layers):
        for name, module in block.named_modules():
            if (short := name.rpartition(".")[2]) in names:
                key = f"blk.{number}.{names[short]}.weight"
                module.register_forward_pre_hook(lambda _m, args, key=key: seen[key].append(args[0][0].double()))
    with torch.no_grad():
        for ids in rows:
            model(torch.tensor([ids]))
    assert sorted(found) == sorted(seen) and len(found) == 16
    for key, parts in seen.items():
        np.testing.assert_allclose(found[key], torch.cat(parts).square().mean(0).numpy(), rtol=1e-4, err_msg=key)


def test_impossible_wishes_are_refused_before_any_work(shaken, tmp_path, context, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(UserError, match="exists already"):
        export_checkpoint(shaken(), tmp_path / "there", config(gguf=["F16"]), context)
    with pytest.raises(UserError, match=r"export\.imatrix: is true, but there are no rows"):
        export_checkpoint(shaken(), tmp_path / "b", config(gguf=["F16"], imatrix=True), context)
    with pytest.raises(UserError, match=r"export\.gguf: IQ2_XS needs an importance matrix, and there are no rows"):
        export_checkpoint(shaken(), tmp_path / "b", config(gguf=["F16", "IQ2_XS"]), context)
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: free)
    with pytest.raises(UserError, match=r"needs about 0\.0 GB .* export fewer types"):
        export_checkpoint(shaken(), tmp_path / "b", config(gguf=["F16"]), context)
    assert not (tmp_path / "b").exists()
    for wrong in ({}, {"gguf": ["F16", "F16"]}, {"gguf": ["Q5"]}, {"onnx": ["int4"], "verify": {"kl": {"int3": 1}}}):
        with pytest.raises(ValidationError):
            ExportConfig.model_validate(wrong)
