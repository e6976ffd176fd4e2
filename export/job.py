"""One bundle in the making: every type at every depth written, read back, opened in its runtime, and compared."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..data.calibration import calibration_batches
from ..errors import UserError
from ..modeling.blocks import KEPT_BLOCKS, depths, kept_blocks, without_blocks
from ..modeling.checkpoint import can_link
from ..modeling.load import load_config, load_model, load_tokenizer
from ..modeling.retaining import has_heads, load_heads
from ..modeling.weights import count_parameters
from ..runtime.bundle import ArtifactEntry, FamilyEntry, Manifest, read_bundle
from ..stage import Context, Inputs, check_deepest, give_back_memory, write_whole
from .artifacts import Gguf, Kind, Making, Onnx
from .bundle import copy_model_files, disk_bytes, list_files, write_manifest
from .card import write_card
from .config import ExportConfig
from .imatrix import collect, load_imatrix, save_imatrix
from .retaining import write_heads
from .verify import Reference, check_weights, probe_windows, torch_reference

# Bits per weight: upper estimates, for the check of free disk.
BITS = {"F16": 16, "Q8_0": 8.5, "Q6_K": 8.5, "Q4_K_M": 6.5, "Q4_0": 6, "int4": 7, "int8": 10, "fp32": 32}


def chosen_depths(config: ExportConfig, checkpoint: Path) -> list[int]:
    """The depths to export a checkpoint at: those named, else those it was sorted for, else all of its blocks."""
    model = load_config(checkpoint)
    found = config.depths or depths(model)
    check_deepest("export.depths", found, model.num_hidden_layers, f"the model in {checkpoint}")
    return found


@dataclass
class Job:
    """One bundle in the making; `work` holds what a run that was killed goes on from."""

    checkpoint: Path
    bundle: Path
    work: Path
    config: ExportConfig
    context: Context
    name: str
    inputs: Inputs

    @cached_property
    def depths(self) -> list[int]:
        return chosen_depths(self.config, self.checkpoint)

    def run(self, provenance: dict[str, Any]) -> dict[str, Any]:
        self._check_disk()
        self.bundle.mkdir(exist_ok=True)
        copy_model_files(self.checkpoint, self.bundle)
        retaining = write_heads(self.checkpoint, self.bundle)
        kinds = self._kinds()
        artifacts: list[ArtifactEntry] = []
        for kind in kinds:
            artifacts += [self._artifact(kind, depth) for depth in reversed(self.depths)]
        config = load_config(self.checkpoint)
        manifest = Manifest(
            name=self.name,
            family=config.model_type,
            parameters=count_parameters(self.checkpoint),
            depths=self.depths,
            kept_blocks=kept_blocks(config),
            importance_matrix=self._wants_imatrix(),
            artifacts=artifacts,
            families=[self._family(kind) for kind in kinds if kind.several],
            retaining=retaining,
            provenance={"kept_recorded": hasattr(config, KEPT_BLOCKS), **provenance},
            files=[],
        )
        write_card(self.bundle, manifest)
        write_manifest(self.bundle, manifest.model_copy(update={"files": list_files(self.bundle)}))
        read_bundle(self.bundle)
        return {
            "artifacts": [artifact.model_dump() for artifact in artifacts],
            "families": [family.model_dump() for family in manifest.families],
        }

    def _kinds(self) -> list[Kind]:
        making = Making(
            self.checkpoint,
            self.bundle,
            self.name,
            self.depths,
            self.config,
            self.context.progress,
            lambda: self._measured[1],
            lambda: self._tokenizer,
        )
        return [*(Gguf(making, t) for t in self.config.gguf), *(Onnx(making, t) for t in self.config.onnx)]

    def _artifact(self, kind: Kind, depth: int) -> ArtifactEntry:
        """One depth of one type, verified; what was verified before a kill is taken from its record."""
        role = kind.role_at(depth)
        record = self.work / f"{role}.json"
        if not record.exists():
            error = self._made(kind)
            found = kind.run(depth, self._measured[0][depth], error)
            size = kind.size(depth)
            entry = ArtifactEntry(
                role=role,
                format=kind.form,
                type=kind.type,
                depth=depth,
                path=kind.path(depth),
                bytes=size.bytes,
                parameters=size.parameters,
                bits_per_weight=round(size.bits_per_weight, 4),
                verification=found,
            )
            self._note(entry)
            write_whole(record, entry.model_dump_json())
        return ArtifactEntry.model_validate_json(record.read_text(encoding="utf-8"))

    def _made(self, kind: Kind) -> float:
        """The largest row error of a type's files, which are written unless they were written and read back before."""
        record = self.work / f"{kind.role}.written.json"
        if not record.exists():
            give_back_memory()  # of the type before; a model builder in its own process comes on top
            kind.clear()
            kind.write()
            kind.check_depths()
            with self.context.progress.bar(f"reading {kind.role} back"):
                error = check_weights(kind.role, kind.errors())
            write_whole(record, json.dumps({"tensor_error": error}))
        return json.loads(record.read_text(encoding="utf-8"))["tensor_error"]

    def _family(self, kind: Kind) -> FamilyEntry:
        linked, copied = disk_bytes(self.bundle / kind.root)
        share = linked / kind.size(self.depths[-1]).bytes
        self.context.progress.note(
            f"{kind.role}: {len(self.depths)} depths in {linked / 1e6:.1f} MB, {share:.3f} of the deepest alone"
        )
        return FamilyEntry(
            format=kind.form, type=kind.type, depths=self.depths, bytes=linked, bytes_without_links=copied
        )

    def _check_disk(self) -> None:
        sizes = [count_parameters(self.checkpoint, depth) for depth in self.depths]
        weights = sizes[-1]
        # Parts of a GGUF that several depths share are links, if there are such; an ONNX weights file is one anyway.
        written = weights if can_link(self.work) else sum(sizes)
        need = sum(written * BITS[kind] / 8 for kind in self.config.gguf)
        need += sum(weights * BITS[kind] / 8 for kind in self.config.onnx)
        vocabulary = (self.checkpoint / "tokenizer.json").stat().st_size  # each depth has it once more, in either form
        need += vocabulary * len(self.depths) * len([*self.config.gguf, *self.config.onnx])
        if self.config.onnx:
            need += 4 * weights  # the float32 graph that the others are made from
        free = shutil.disk_usage(self.work).free
        if need > free:
            raise UserError(
                f"exporting {self.name} needs about {need / 1e9:.1f} GB in {self.bundle.parent}, where "
                f"{free / 1e9:.1f} GB are free; free some space or export fewer types"
            )

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.checkpoint)

    @cached_property
    def _measured(self) -> tuple[dict[int, Reference], dict[str, Any] | None]:
        """What the checkpoint says: its distributions at each depth, and the importance matrix."""
        found = self._measure()
        give_back_memory()  # of the model, whose modules refer to each other
        return found

    def _measure(self) -> tuple[dict[int, Reference], dict[str, Any] | None]:
        model = load_model(self.checkpoint, self.context.dtype, self.context.device)
        settings = self.config.verify
        data = self.inputs.stages.get("data")
        windows = probe_windows(self._tokenizer, data, settings.tokens, settings.window)
        heads = load_heads(self.checkpoint, model.config) if has_heads(self.checkpoint) else None
        references = {}
        for depth in self.depths:
            with without_blocks(model, range(depth, self.depths[-1])):
                references[depth] = torch_reference(model, windows, heads)
        return references, self._imatrix(model)

    def _wants_imatrix(self) -> bool:
        return "data" in self.inputs.stages if self.config.imatrix is None else self.config.imatrix

    def _imatrix(self, model: Any) -> dict[str, Any] | None:
        """Mean squared inputs of every matrix; those of a block are the same at every depth that has it."""
        if not self._wants_imatrix():
            return None
        file = self.work / "imatrix.safetensors"
        if not file.exists():
            tokens = self.config.imatrix_tokens
            batches = calibration_batches(self.inputs, self._tokenizer, tokens=tokens, length=512, batch=4)
            with self.context.progress.bar("importance matrix", sum(batch.tokens for batch in batches)) as advance:
                save_imatrix(collect(model, batches, advance), file.with_suffix(".tmp"))
            file.with_suffix(".tmp").replace(file)
        return load_imatrix(file)

    def _note(self, entry: ArtifactEntry) -> None:
        v = entry.verification
        self.context.progress.note(
            f"{entry.role}: {entry.bytes / 1e6:.1f} MB, verified in {v.runtime}: perplexity {v.perplexity:.2f} "
            f"(checkpoint {v.checkpoint_perplexity:.2f}), KL {v.kl:.4f}"
        )
