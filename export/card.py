"""The bundle's README.md (a model card) and Ollama Modelfile.

The card is written with the bundle, and again when a run's evaluation has set the files beside their rivals. So the
manifests have no hash of it; it holds no times, and follows from the manifest and the evaluation alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..core.files import read_json, write_whole
from ..core.units import kilobytes
from ..modeling.families import family_of
from ..modeling.shape import AttentionShape
from ..records.bundle import ArtifactEntry, BundleManifest
from ..records.models import ModelEntry
from .ends import end_tokens, read_vocabulary

CARD = "README.md"


def write_card(bundle: Path, manifest: BundleManifest, models: Sequence[ModelEntry] = ()) -> None:
    """Write README.md, which follows from the manifest and config.json.

    `models` are an evaluation's entries: the card then says how the files compare with the unpruned model quantized to
    at most their bytes.
    """
    import jinja2

    gguf, onnx = (_first_type(manifest, form) for form in ("gguf", "onnx"))
    template = files("compress.export").joinpath("card.md.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, autoescape=False, keep_trailing_newline=True)
    text = environment.from_string(template).render(
        manifest=manifest,
        several=len(manifest.depths) > 1,
        gguf=gguf,
        onnx=onnx,
        single=lambda artifact: _single(manifest, artifact),
        base=manifest.provenance.get("base"),
        base_blocks=manifest.provenance.get("base_blocks", len(manifest.kept_blocks)),
        recovered=bool({"distill", "sort"} & manifest.provenance.get("stages", {}).keys()),
        kept=ranges(manifest.kept_blocks),
        kilobytes=kilobytes,
        # It begins with an empty cache of floats.
        optimum=bool(onnx) and onnx[0].kv == "float32" and optimum_runs(read_json(bundle / "config.json")),
        beside=[model for model in models if model.standings or model.rival_of],
        sentences=[standing.sentence for model in models for standing in model.standings],
        positions=models[0].positions if models else 0,
    )
    write_whole(bundle / CARD, text)


def write_modelfile(bundle: Path, manifest: BundleManifest) -> None:
    """Write Ollama's Modelfile, where there is a GGUF.

    Ollama imports no GGUF that is cut into parts (ollama/ollama issue 5245): for several depths the Modelfile names
    the single file that the card's command extracts.
    """
    gguf = _first_type(manifest, "gguf")
    if not gguf:
        return
    file = _single(manifest, gguf[0]) if len(manifest.depths) > 1 else gguf[0].path
    words = {number: token for token, number in read_vocabulary(bundle).items()}
    # Ollama ends at texts: those of the tokens that end one everywhere else.
    ends = [words[number] for number in end_tokens(bundle) if number in words]
    lines = [f"FROM ./{file}", *(f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}" for text in ends)]
    write_whole(bundle / "Modelfile", "\n".join(lines) + "\n")


def _single(manifest: BundleManifest, artifact: ArtifactEntry) -> str:
    """The name of the one file that a depth of a type is extracted to."""
    depth = "" if artifact.depth == manifest.depths[-1] else f"-d{artifact.depth}"
    return f"{manifest.name}-{artifact.type}{depth}.gguf"


def optimum_runs(config: dict[str, Any]) -> bool:
    """Whether Optimum's ORTModelForCausalLM (optimum-onnx 0.1.0) gives the graph a cache of the right shape.

    It assumes a head size of hidden size ÷ heads, except for Gemma-3, and as many KV heads as heads for Phi-3.
    """
    builder, shape = family_of(config).onnx, AttentionShape.of(config)
    if builder is None or not (builder.optimum_kv_heads or shape.kv_heads == shape.heads):
        return False
    return builder.optimum_head_dim or shape.size == config["hidden_size"] // shape.heads


def _first_type(manifest: BundleManifest, form: str) -> list[ArtifactEntry]:
    """The depths of the first type of a format."""
    found = [artifact for artifact in manifest.artifacts if artifact.format == form]
    return [artifact for artifact in found if artifact.type == found[0].type]


def ranges(numbers: list[int]) -> str:
    """0, 1, 2, 5 as 0-2, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
