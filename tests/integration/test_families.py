"""Every family the whole way: cut in two places, healed, saved, exported, run in llama.cpp and ONNX Runtime.

And what blocks dropped here make of a GGUF file, against what llama.cpp's own `--prune-layers` makes of it.
"""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import pytest
import torch
from compress.core.stage import Context, Inputs
from compress.export.gguf import context_length, write_gguf
from compress.export.mixes import FILE_TYPES
from compress.export.onnx import write_onnx
from compress.modeling.blocks import Decoder, drop_blocks, without_blocks
from compress.modeling.checkpoint import save_checkpoint
from compress.modeling.families import FAMILIES
from compress.modeling.load import load_config, load_model, load_tokenizer
from compress.prune import stage
from compress.prune.config import PruneConfig
from compress.runtime.engine import ScoringWindow
from compress.runtime.llamacpp_engine import LlamaCppEngine
from compress.runtime.onnx_engine import OnnxEngine
from transformers import AutoModelForCausalLM

SAME = 1e-5  # nats, of every log-probability: the same weights in torch twice
ONNX = 2e-5  # nats: float32 in ONNX Runtime
F16 = 0.01  # nats: weights, keys and values in float16 in llama.cpp
Q8_0 = 0.005  # nats, mean KL to the checkpoint
VISIBLE = 0.2  # nats by which another model must differ at some token, or the comparisons would not notice it
IDS = [(37 * i) % 450 + 3 for i in range(60)]
WORDS = ["the way", "of many", "people", "is é", "42", "which", "model", "time"]

BLOCKS = 6
WEAK = [1, 3]  # the blocks that add little, so that any search chooses them
KEPT = [0, 2, 4, 5]
SLIDES = [True, False, True, True, False, False]  # of the kept blocks the first two slide, of the first four others
LAYERS = ["sliding_attention" if slides else "full_attention" for slides in SLIDES]
WINDOWS = {"layer_types": LAYERS, "sliding_window": 8}
QWEN_WINDOWS = {**WINDOWS, "use_sliding_window": True}
GREEDY = {"search": {"kind": "greedy", "score": "kl"}, "heal": "refit"}
LOWEST = {"search": "lowest", "importance": "kl", "heal": "refit"}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {"tied": False}, GREEDY),
    "llama, linear": ("llama", {"attention_bias": True, "mlp_bias": True}, {**LOWEST, "heal": "linear"}),
    "mistral": ("mistral", {"sliding_window": 32}, LOWEST),
    "qwen2": ("qwen2", {}, GREEDY),
    "qwen2 with windows": ("qwen2", QWEN_WINDOWS, LOWEST),
    "qwen3": ("qwen3", {"head_dim": 32}, GREEDY),
    "phi3": ("phi3", {"tied": False}, LOWEST),
    "gemma3 with windows": ("gemma3_text", WINDOWS, GREEDY),
    "gemma3 with windows, linear": ("gemma3_text", WINDOWS, {**LOWEST, "heal": "linear"}),
}


@dataclass(frozen=True)
class Pruned:
    """What the prune stage made of a base model."""

    options: dict[str, Any]  # of the base's configuration
    base: Path
    folder: Path  # the checkpoint
    model: Any  # in memory, as the stage had it when it saved it
    record: dict[str, Any]


@pytest.fixture(scope="module", params=CASES)
def pruned(
    request: pytest.FixtureRequest, shaken: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Pruned:
    family, options, prune = CASES[request.param]
    folder = tmp_path_factory.mktemp(family)
    base = with_weak_blocks(shaken(family, blocks=BLOCKS, **options), folder / "base")
    (folder / "text.txt").write_text(draw_text(1, 900), encoding="utf-8")
    calibration = {"tokens": 600, "length": 48, "scoring": 96, "held_out": 96, "text": "text.txt"}
    config = PruneConfig.model_validate({"blocks": len(WEAK), "calibration": calibration, **prune})
    saved: list[Any] = []

    def save(model: Any, tokenizer: Any, out: Path) -> None:
        saved.append(model)
        save_checkpoint(model, tokenizer, out)

    (folder / "out").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "save_checkpoint", save)
        stage.run(config, Inputs(base, base), folder / "out", Context(recipe_dir=folder))
    record = json.loads((folder / "out" / "importance.json").read_text())
    return Pruned(options, base, folder / "out" / "model", saved[0], record)


def draw_text(seed: int, words: int) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(words))


def with_weak_blocks(checkpoint: Path, out: Path) -> Path:
    model = load_model(checkpoint)
    for block in WEAK:
        for parameter, value in Decoder(model).rescaled(block, 0.3).items():
            parameter.data = value.to(parameter)
    save_checkpoint(model, load_tokenizer(checkpoint), out)
    return out


@torch.no_grad()
def logprobs(model: Any, ids: Sequence[int] = IDS) -> np.ndarray:
    """(T, V), in torch."""
    return torch.log_softmax(model(torch.tensor([ids])).logits[0], -1).numpy()


@torch.no_grad()
def stepwise(model: Any) -> np.ndarray:
    """The same token by token: the cache is addressed by the blocks' new numbers, and knows which of them slide."""
    past, rows = None, []
    for token in IDS:
        output = model(torch.tensor([[token]]), past_key_values=past, use_cache=True)
        past = output.past_key_values
        rows.append(torch.log_softmax(output.logits[0, 0], -1).numpy())
    return np.stack(rows)


def differ(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())


def divergence(a: np.ndarray, b: np.ndarray) -> float:
    """Mean KL(a ‖ b) of log-probabilities (T, V), in nats."""
    return float((np.exp(a) * (a - b)).sum(-1).mean())


def test_every_family_is_here():
    assert {family for family, *_ in CASES.values()} == set(FAMILIES)
    assert {family for family, _, prune in CASES.values() if prune["heal"] == "refit"} == set(FAMILIES)


def test_both_gaps_are_healed(pruned):
    """The healed model is nearer to the base than the one merely cut, on a text that healing has not seen."""
    record = pruned.record
    assert (record["dropped"], record["kept"]) == (WEAK, KEPT)
    assert [(healing["block"], healing["gap"]) for healing in record["healing"]] == [(0, [1, 1]), (2, [3, 3])]
    for healing in record["healing"]:
        assert min(healing["errors"].values()) < healing["unhealed_error"]
    base = load_model(pruned.base)
    ids = load_tokenizer(pruned.base)(draw_text(2, 80))["input_ids"]
    whole, healed = logprobs(base, ids), logprobs(pruned.model, ids)
    with without_blocks(base, WEAK):
        cut = logprobs(base, ids)
    assert divergence(whole, healed) < divergence(whole, cut)
    assert differ(healed, cut) > VISIBLE and differ(healed, whole) > VISIBLE


def test_the_checkpoint_loads_plainly_as_it_was_in_memory(pruned):
    model: Any = AutoModelForCausalLM.from_pretrained(pruned.folder)
    found, expected = model.state_dict(), pruned.model.state_dict()
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    assert differ(logprobs(model), logprobs(pruned.model)) < SAME
    assert differ(stepwise(model), logprobs(model)) < SAME


def test_every_list_of_the_configuration_has_an_entry_per_block(pruned):
    base, found = (json.loads((folder / "config.json").read_text()) for folder in (pruned.base, pruned.folder))
    assert found["num_hidden_layers"] == len(KEPT)
    lists = {key: value for key, value in base.items() if isinstance(value, list) and len(value) == BLOCKS}
    assert {key: found[key] for key in lists} == {key: [value[i] for i in KEPT] for key, value in lists.items()}
    assert lists.get("layer_types") == pruned.options.get("layer_types", lists.get("layer_types"))


def test_llama_cpp_predicts_what_torch_does(pruned, tmp_path):
    length = min(len(IDS), context_length(load_config(pruned.folder)))
    ids, positions = IDS[:length], sorted({1, 2, 5, length // 3, length // 2, length - 1})
    expected = logprobs(load_model(pruned.folder), ids)
    for kind in ("F16", "Q8_0"):
        write_gguf(pruned.folder, tmp_path / f"{kind}.gguf", kind)
        with LlamaCppEngine(tmp_path / f"{kind}.gguf", threads=1, context=length, slots=1) as engine:
            scores = engine.score([ScoringWindow(ids, positions)])[0]
        assert all(score.complete for score in scores)
        found = np.stack([score.logprobs for score in scores])
        wanted = expected[[score.position - 1 for score in scores]]
        if kind == "F16":
            assert differ(found, wanted) < F16
        else:
            assert divergence(wanted, found) < Q8_0
        assert {len(values) for values in read(tmp_path / f"{kind}.gguf").arrays.values()} <= {len(KEPT)}


def test_onnx_runtime_predicts_what_torch_does(pruned, tmp_path, inline_builder):
    write_onnx(pruned.folder, tmp_path / "m", "fp32")
    with OnnxEngine(tmp_path / "m", threads=1) as engine:
        scores = engine.score([ScoringWindow.of(IDS)])[0]
    expected = logprobs(load_model(pruned.folder))[:-1]
    assert differ(np.stack([score.logprobs for score in scores]), expected) < ONNX
    graph = onnx.load(str(tmp_path / "m" / "model.onnx"), load_external_data=False).graph
    windows = [
        next((attribute.i for attribute in node.attribute if attribute.name == "local_window_size"), -1)
        for node in graph.node
        if node.op_type == "GroupQueryAttention"
    ]
    config = load_config(pruned.folder)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * len(KEPT)
    assert windows == [window if kind == "sliding_attention" else -1 for kind in kinds]
    settings = json.loads((tmp_path / "m" / "genai_config.json").read_text())["model"]["decoder"]
    assert settings["num_hidden_layers"] == len(KEPT)


@dataclass(frozen=True)
class Gguf:
    """What a GGUF file holds."""

    values: dict[str, Any]  # every metadata value, arrays as lists; what GGUF counts itself left out
    tensors: dict[str, tuple[str, tuple[int, ...], str]]  # type, shape, and hash of the bytes

    @property
    def blocks(self) -> int:
        return self.values[f"{self.values['general.architecture']}.block_count"]

    @property
    def arrays(self) -> dict[str, list[Any]]:
        """The architecture's own keys that hold arrays: all of these families' are per block."""
        prefix = f"{self.values['general.architecture']}."
        return {k: value for k, value in self.values.items() if k.startswith(prefix) and isinstance(value, list)}


def read(file: Path) -> Gguf:
    reader = gguf.GGUFReader(file)
    values = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    tensors = {
        t.name: (t.tensor_type.name, tuple(int(n) for n in t.shape), hashlib.sha256(t.data.tobytes()).hexdigest())
        for t in reader.tensors
    }
    return Gguf(values, tensors)


def llama_quantize(source: Path, out: Path, kind: int | str, dropped: Sequence[int] = ()) -> Path:
    """llama.cpp's quantizer; `kind` is a number of llama_ftype, or "copy"."""
    script = Path(__file__).parents[1] / "llama_quantize.py"
    blocks = ",".join(map(str, dropped))
    command = [sys.executable, str(script), str(source), str(out), str(kind), blocks, ""]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def export_both(checkpoint: Path, folder: Path, kind: str, dropped: Sequence[int]) -> tuple[Path, Path]:
    """The GGUF of the whole model, and the one of the model without some blocks (whose checkpoint is `pruned`)."""
    write_gguf(checkpoint, folder / "whole.gguf", kind, name="x")
    model = load_model(checkpoint)
    drop_blocks(model, dropped)
    save_checkpoint(model, load_tokenizer(checkpoint), folder / "pruned")
    write_gguf(folder / "pruned", folder / "ours.gguf", kind, name="x")
    return folder / "whole.gguf", folder / "ours.gguf"


def check_like_theirs(whole: Gguf, ours: Gguf, theirs: Gguf, kept: Sequence[int]) -> None:
    """The same but for the arrays per block, which llama.cpp leaves as they were (its issue 27976): ours are cut."""
    assert ours.tensors == theirs.tensors
    assert ours.blocks == theirs.blocks == len(kept)
    assert ours.arrays == {key: [values[i] for i in kept] for key, values in whole.arrays.items()}
    for key in ours.arrays:
        assert theirs.values[key] in (whole.values[key], ours.values[key]), key
    rest = theirs.values.keys() - ours.arrays.keys()
    assert {key: ours.values[key] for key in ours.values if key not in ours.arrays} == {
        key: theirs.values[key] for key in rest
    }


PARITY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tied": False}),
    "mistral": ("mistral", {"sliding_window": 32}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "phi3": ("phi3", {}),
    "gemma3 with windows": ("gemma3_text", WINDOWS),
}


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
@pytest.mark.parametrize("case", PARITY)
def test_dropping_blocks_makes_the_file_that_llama_cpp_prunes(shaken, tmp_path, case, kind):
    family, options = PARITY[case]
    whole, ours = export_both(shaken(family, blocks=BLOCKS, **options), tmp_path, kind, WEAK)
    theirs = read(llama_quantize(whole, tmp_path / "theirs.gguf", "copy", WEAK))
    check_like_theirs(read(whole), read(ours), theirs, KEPT)
    assert theirs.tensors != read(llama_quantize(whole, tmp_path / "others.gguf", "copy", [1, 2])).tensors
    wanted = {"gemma3.attention.sliding_window_pattern": [SLIDES[i] for i in KEPT]} if family == "gemma3_text" else {}
    assert read(ours).arrays == wanted


@pytest.mark.real  # here, not in tests/real: it compares files as the tests around it do
def test_dropping_blocks_of_the_real_model_makes_the_file_that_llama_cpp_prunes(smollm2, tmp_path):
    whole, ours = export_both(smollm2, tmp_path, "Q8_0", range(13, 19))
    theirs = llama_quantize(whole, tmp_path / "theirs.gguf", "copy", range(13, 19))
    check_like_theirs(read(whole), read(ours), read(theirs), [*range(13), *range(19, 30)])


@pytest.mark.parametrize("mix", ["F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q2_K"])
def test_llama_cpp_quantizes_a_pruned_model_to_the_same_bytes(shaken, tmp_path, mix):
    """From weights that float16 holds exactly. Which blocks get more bits depends on how many there are."""
    checkpoint = shaken(blocks=8, hidden=256, heads=8, kv_heads=4, intermediate=512, tied=False)
    save_checkpoint(load_model(checkpoint).half().float(), load_tokenizer(checkpoint), tmp_path / "half")
    whole, pruned = export_both(tmp_path / "half", tmp_path, "F16", [1, 4])
    write_gguf(tmp_path / "pruned", tmp_path / "mix.gguf", mix, name="x")
    number = FILE_TYPES[mix][0]
    theirs = read(llama_quantize(pruned, tmp_path / "theirs.gguf", number))
    assert read(tmp_path / "mix.gguf") == theirs
    if mix not in (
        "Q4_K_M",
        "Q5_K_M",
    ):  # pruning, llama.cpp goes on counting the whole model's blocks: others get more bits
        assert theirs.tensors == read(llama_quantize(whole, tmp_path / "at-once.gguf", number, [1, 4])).tensors
