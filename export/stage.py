"""The export stage: one bundle with every artifact written, opened in its runtime, and compared."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.calibration import calibration_batches
from ..errors import UserError
from ..modeling.blocks import KEPT_BLOCKS, kept_blocks
from ..modeling.checkpoint import count_parameters
from ..modeling.load import load_config, load_model, load_tokenizer
from ..runtime.bundle import ArtifactEntry, Manifest, read_bundle
from ..runtime.genai_engine import GenaiEngine
from ..runtime.llamacpp_engine import LlamaCppEngine
from ..runtime.onnx_engine import OnnxEngine
from ..stage import WORK, Context, Inputs
from .bundle import copy_model_files, list_files, write_manifest
from .card import write_card
from .config import ExportConfig
from .gguf import check_gguf, write_gguf
from .imatrix import collect, load_imatrix, save_imatrix
from .onnx import check_onnx, write_onnx
from .tensors import gguf_errors, onnx_errors
from .verify import (
    PROBE,
    Reference,
    check_runtime,
    check_tokens,
    check_weights,
    probe_windows,
    torch_reference,
)

BUNDLE = "bundle"
# Bits per weight: upper estimates, for the check of free disk.
BITS = {"F16": 16, "Q8_0": 8.5, "Q6_K": 8.5, "Q4_K_M": 6.5, "Q4_0": 6, "int4": 7, "int8": 10, "fp32": 32}


def check(config: ExportConfig, base: Path, context: Context) -> None:
    """Refuse what GGUF or ONNX cannot carry before any work is done."""
    if config.gguf:
        check_gguf(base)
    for precision in config.onnx:
        check_onnx(load_config(base), precision)


def run(config: ExportConfig, inputs: Inputs, out_dir: Path, context: Context) -> dict[str, Any]:
    """Write `bundle/`; after a kill, artifacts that were verified are kept."""
    if config.imatrix and "data" not in inputs.stages:
        raise UserError("export.imatrix is true, but the recipe has no data stage to collect it on")
    provenance: dict[str, Any] = {
        # The folder of a stage is named after its fingerprint.
        "stages": {name: folder.name.rpartition("-")[2] for name, folder in inputs.stages.items()},
        "base": inputs.name,
        "base_blocks": load_config(inputs.base).num_hidden_layers,
    }
    work = out_dir / WORK
    work.mkdir(exist_ok=True)
    name = f"{plain_name(inputs.name)}-{_blocks(inputs.model)}L"
    job = Job(inputs.model, out_dir / BUNDLE, work, config, context, name, inputs)
    return job.run(provenance)


def export_checkpoint(
    checkpoint: Path, out: Path, config: ExportConfig, context: Context, name: str | None = None
) -> dict[str, Any]:
    """Export any checkpoint into the bundle `out`, which must not exist yet (an unfinished one is gone on with)."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already; give another --out, or remove it")
    if config.imatrix:
        raise UserError("an importance matrix needs a recipe with a data stage")
    check(config, checkpoint, context)
    partial = out.with_name(f".{out.name}.partial")
    work = partial / WORK
    work.mkdir(parents=True, exist_ok=True)
    bundle = partial / BUNDLE
    inputs = Inputs(checkpoint, checkpoint)
    metrics = Job(checkpoint, bundle, work, config, context, name or checkpoint.name, inputs).run({})
    if out.exists():
        out.rmdir()
    bundle.rename(out)
    shutil.rmtree(partial)
    return metrics


def plain_name(model: str) -> str:
    """A model's name without its owner, and without the type that a GGUF file's name ends in."""
    name = model.rsplit("/", 1)[-1]
    return re.sub(r"(?<=.)[.-](F16|BF16|F32|I?Q\d\w*)$", "", name, flags=re.IGNORECASE)


def _blocks(checkpoint: Path) -> int:
    return load_config(checkpoint).num_hidden_layers


@dataclass
class Job:
    """One bundle in the making."""

    checkpoint: Path
    bundle: Path
    work: Path
    config: ExportConfig
    context: Context
    name: str
    inputs: Inputs

    def run(self, provenance: dict[str, Any]) -> dict[str, Any]:
        self._check_disk()
        self.bundle.mkdir(exist_ok=True)
        copy_model_files(self.checkpoint, self.bundle)
        todo = [("gguf", kind) for kind in self.config.gguf] + [("onnx", kind) for kind in self.config.onnx]
        records = {f"{form}-{kind}": self.work / f"{form}-{kind}.json" for form, kind in todo}
        if not all(record.exists() for record in records.values()):
            self.tokenizer = load_tokenizer(self.checkpoint)
            model = load_model(self.checkpoint, self.context.dtype, self.context.device)
            self.reference = self._reference(model)
            self.imatrix = self._imatrix(model)
            del model
        artifacts = []
        for form, kind in todo:
            record = records[f"{form}-{kind}"]
            if not record.exists():
                entry = self._gguf(kind) if form == "gguf" else self._onnx(kind)
                self._note(entry)
                record.write_text(entry.model_dump_json(), encoding="utf-8")
            artifacts.append(ArtifactEntry.model_validate_json(record.read_text(encoding="utf-8")))
        config = load_config(self.checkpoint)
        manifest = Manifest(
            name=self.name,
            family=config.model_type,
            parameters=count_parameters(self.checkpoint),
            depths=[config.num_hidden_layers],
            kept_blocks=kept_blocks(config),
            importance_matrix=self._wants_imatrix(),
            artifacts=artifacts,
            provenance={"kept_recorded": hasattr(config, KEPT_BLOCKS), **provenance},
            files=[],
        )
        write_card(self.bundle, manifest)
        write_manifest(self.bundle, manifest.model_copy(update={"files": list_files(self.bundle)}))
        read_bundle(self.bundle)
        return {"artifacts": [artifact.model_dump() for artifact in artifacts]}

    def _check_disk(self) -> None:
        weights = count_parameters(self.checkpoint)
        need = sum(weights * BITS[kind] / 8 for kind in [*self.config.gguf, *self.config.onnx])
        if self.config.onnx:
            need += 4 * weights  # the float32 graph that the others are made from
        free = shutil.disk_usage(self.work).free
        if need > free:
            raise UserError(
                f"exporting {self.name} needs about {need / 1e9:.1f} GB in {self.bundle.parent}, where "
                f"{free / 1e9:.1f} GB are free; free some space or export fewer types"
            )

    def _reference(self, model: Any) -> Reference:
        settings = self.config.verify
        windows = probe_windows(self.tokenizer, self.inputs.stages.get("data"), settings.tokens, settings.window)
        return torch_reference(model, windows)

    def _wants_imatrix(self) -> bool:
        return "data" in self.inputs.stages if self.config.imatrix is None else self.config.imatrix

    def _imatrix(self, model: Any) -> dict[str, Any] | None:
        if not self._wants_imatrix():
            return None
        file = self.work / "imatrix.safetensors"
        if not file.exists():
            tokens = self.config.imatrix_tokens
            batches = calibration_batches(self.inputs, self.tokenizer, tokens=tokens, length=512, batch=4)
            with self.context.progress.bar("importance matrix", sum(batch.tokens for batch in batches)) as advance:
                save_imatrix(collect(model, batches, advance), file.with_suffix(".tmp"))
            file.with_suffix(".tmp").replace(file)
        return load_imatrix(file)

    def _gguf(self, kind: str) -> ArtifactEntry:
        path = f"gguf/{self.name}-{kind}.gguf"
        info = write_gguf(
            self.checkpoint,
            self.bundle / path,
            kind,
            imatrix=None if kind in ("F16", "Q8_0") else self.imatrix,
            name=self.name,
            threads=self.config.threads,
            progress=self.context.progress,
        )
        role = f"gguf-{kind}"
        error = self._weights(role, gguf_errors(self.bundle / path, self.checkpoint))
        # One slot: how texts share a batch depends on timing, and with it the last digits.
        with LlamaCppEngine(self.bundle / path, self.config.threads, context=self._context(), slots=1) as engine:
            expected = self.tokenizer(PROBE, add_special_tokens=False, verbose=False).input_ids
            check_tokens(role, engine.tokenize(PROBE), expected)
            found = check_runtime(role, kind, engine, self.reference, self.config.verify.kl, error)
        return ArtifactEntry(
            role=role,
            format="gguf",
            depth=load_config(self.checkpoint).num_hidden_layers,
            type=kind,
            path=path,
            bytes=info.bytes,
            bits_per_weight=round(info.bits_per_weight, 4),
            verification=found,
        )

    def _onnx(self, kind: str) -> ArtifactEntry:
        path = f"onnx/{kind}"
        info = write_onnx(
            self.checkpoint, self.bundle / path, kind, imatrix=self.imatrix, progress=self.context.progress
        )
        role = f"onnx-{kind}"
        error = self._weights(role, onnx_errors(self.bundle / path, self.checkpoint))
        with OnnxEngine(self.bundle / path, self.config.threads) as engine:
            found = check_runtime(role, kind, engine, self.reference, self.config.verify.kl, error)
        with GenaiEngine(self.bundle / path) as engine:
            few = Reference(self.reference.windows[:1], self.reference.scores[:1])
            check_runtime(role, kind, engine, few, self.config.verify.kl, error)
        return ArtifactEntry(
            role=role,
            format="onnx",
            depth=load_config(self.checkpoint).num_hidden_layers,
            type=kind,
            path=path,
            bytes=info.bytes,
            bits_per_weight=round(info.bits_per_weight, 4),
            verification=found,
        )

    def _weights(self, role: str, errors: Iterator[tuple[str, str, float]]) -> float:
        with self.context.progress.bar(f"reading {role} back"):
            return check_weights(role, errors)

    def _context(self) -> int:
        return max(self.config.verify.window + 8, 256)

    def _note(self, entry: ArtifactEntry) -> None:
        v = entry.verification
        self.context.progress.note(
            f"{entry.role}: {entry.bytes / 1e6:.1f} MB, verified in {v.runtime}: perplexity {v.perplexity:.2f} "
            f"(checkpoint {v.checkpoint_perplexity:.2f}), KL {v.kl:.4f}"
        )
