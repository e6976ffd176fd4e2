"""Building one bundle: every type at every depth is written, read back, opened in its runtime, and compared."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.files import read_json, write_json
from ..core.geometry import Geometry
from ..core.memory import give_back_memory
from ..core.stage import Context, Inputs, check_deepest
from ..modeling.blocks import KEPT_BLOCKS, depths, kept_blocks, without_blocks
from ..modeling.checkpoint import can_link
from ..modeling.geometry import geometry_of
from ..modeling.load import load_config, load_model, load_tokenizer
from ..modeling.retaining import has_heads, load_heads
from ..modeling.shape import original_context
from ..modeling.types import CausalModel
from ..modeling.weights import count_parameters
from ..records.bundle import ArtifactEntry, BundleManifest, FamilyEntry, TrainedScales
from ..records.figures import ExportFigures
from ..records.record import Entry
from ..runtime.artifact_sizes import bits_per_weight
from ..runtime.bundle import read_bundle
from ..runtime.cost import cache_type, kv_bytes_per_token
from ..runtime.engine import ScoringWindow
from .artifacts import GgufKind, Kind, Making, OnnxKind
from .bundle import copy_model_files, disk_bytes, list_files
from .card import write_card, write_modelfile
from .choices import Choices
from .config import ExportConfig
from .cost import CACHE_ROW
from .gguf import context_length
from .imatrix import Importance, carried_imatrix, kept_imatrix
from .onnx import build_graph
from .onnx_kv import CacheScales
from .retaining import write_heads
from .rounded_cache import calibration_rows, kept_scales, rounded_cache_kl
from .scale_training import ScaleRows, train_scales
from .sensitivity import Sensitivity
from .sensitivity_rows import kept_sensitivity
from .verify import (
    Reference,
    by_length,
    check_weights,
    far_windows,
    gapped_reference,
    long_window,
    probe_windows,
    torch_reference,
)

SHORTEST = 16  # tokens that llama.cpp must be able to run as the checkpoint does


def chosen_depths(config: ExportConfig, checkpoint: Path) -> list[int]:
    """The depths to export: those configured, else those the model was trained for, else all of its blocks."""
    model = load_config(checkpoint)
    found = config.depths or depths(model)
    check_deepest("export.depths", found, model.num_hidden_layers, f"the model in {checkpoint}")
    return found


@dataclass(frozen=True)
class MeasuredCheckpoint:
    """What is measured of the checkpoint while it is in memory."""

    references: dict[str, dict[int, Reference]]  # its predictions on each format's probe text, at each depth
    imatrix: dict[str, Any] | None
    sensitivity: Sensitivity | None


class MadeFiles(Entry):
    """What was found when a type's files were written."""

    tensor_error: float  # largest row error
    trained_scales: TrainedScales | None = None


@dataclass
class ExportJob:
    """Builds one bundle; `work` holds the state that a killed run resumes from."""

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
        self._choices.check()
        if self.config.trained:
            _ = self._rows  # too few are refused before anything is written
        self.bundle.mkdir(exist_ok=True)
        copy_model_files(self.checkpoint, self.bundle)
        retaining = write_heads(self.checkpoint, self.bundle)
        kinds = self._kinds()
        artifacts: list[ArtifactEntry] = []
        for kind in kinds:
            artifacts += [self._artifact(kind, depth) for depth in reversed(self.depths)]
        config = load_config(self.checkpoint)
        manifest = BundleManifest(
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
        write_modelfile(self.bundle, manifest)
        manifest.model_copy(update={"files": list_files(self.bundle)}).write(self.bundle)
        read_bundle(self.bundle)
        return ExportFigures(artifacts=artifacts, families=manifest.families).model_dump()

    def _kinds(self) -> list[Kind]:
        making = Making(
            self.checkpoint,
            self.bundle,
            self.name,
            self.depths,
            self.config,
            self.context.progress,
            lambda: self._imatrix,
            self._choices,
            lambda: self._tokenizer,
            lambda: self._built,
            lambda: self._cache_scales,
            place=self.context.place,
        )
        return [*(GgufKind(making, t) for t in self.config.gguf), *(OnnxKind(making, t) for t in self.config.onnx)]

    def _artifact(self, kind: Kind, depth: int) -> ArtifactEntry:
        """One depth of one type, verified; what was verified before the run was killed is read from its record."""
        role = kind.role_at(depth)
        record = self.work / f"{role}.json"
        if not record.exists():
            made = self._made(kind)
            graph = self._graph(kind)[str(depth)]
            found = kind.run(depth, self._references[kind.form][depth], made.tensor_error)
            rounded = self._rounded_cache(kind).get(str(depth)) if self._quantizes_cache(kind) else None
            found = found.model_copy(update={"graph_kl": graph, "kv_kl": rounded})
            cache = cache_type(kind.form, self.config.kv)
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
                kv=cache,
                kv_bytes_per_token=kv_bytes_per_token(self._shape, depth, cache),
                verification=found,
                trained_scales=made.trained_scales,
            )
            self._note(entry)
            write_json(record, entry.model_dump())
        return ArtifactEntry.model_validate(read_json(record))

    def _made(self, kind: Kind) -> MadeFiles:
        """What was found when a type's files were written, which is now unless an earlier attempt did so."""
        record = self.work / f"{kind.role}.written.json"
        if not record.exists():
            give_back_memory()  # of the type before; a model builder in its own process comes on top
            kind.clear()
            kind.write()
            kind.check_depths()
            with self.context.progress.bar(f"reading {kind.role} back"):
                made = MadeFiles(tensor_error=check_weights(kind.role, kind.errors()))
            trained = self._train_scales(kind) if kind.type in self.config.trained else None
            if trained is not None:
                with self.context.progress.bar(f"reading {kind.role} back"):
                    error = check_weights(kind.role, kind.errors(), trained.moved)
                made = MadeFiles(tensor_error=error, trained_scales=trained)
            write_json(record, made.model_dump())
        return MadeFiles.model_validate(read_json(record))

    def _train_scales(self, kind: Kind) -> TrainedScales | None:
        """Train the scales of a type's files, which were written and read back before."""
        found = train_scales(self._rows, kind.scales(), kind.role, self.work / f"{kind.role}.scales.safetensors")
        give_back_memory()
        if found is None:
            said = "none of its matrices has scales to train"
        elif not found.step:
            kl = found.held_out_kl
            said = f"training its scales did not lower the held-out KL ({kl:.4f}); they stay as rounding left them"
        else:
            kls = f"{found.held_out_kl_before:.4f} → {found.held_out_kl:.4f}"
            said = f"trained scales, held-out KL {kls} (step {found.step} of {found.steps})"
        self.context.progress.note(f"{kind.role}: {said}")
        return found

    @cached_property
    def _rows(self) -> ScaleRows:
        """What the scales of all types are trained on."""
        assert self.config.train_scales is not None
        data = self.inputs.stages["data"]
        return ScaleRows(self.config.train_scales, self.checkpoint, data, self.depths, self.context)

    def _graph(self, kind: Kind) -> dict[str, float]:
        """Depth → KL of a format's graph at high precision: of the type that the bundle has, or of files that are made
        for it and deleted again. Checked once per format."""
        record = self.work / f"graph-{kind.form}.json"
        if not record.exists():
            making = kind.making
            types = self.config.gguf if kind.form == "gguf" else self.config.onnx
            place = self.work / "graph"
            precise = type(kind)(making, kind.precise)
            if kind.precise in types and not self._quantizes_cache(kind):
                self._made(precise)
            else:
                shutil.rmtree(place, ignore_errors=True)
                plain = replace(making, bundle=place, temporary=True, cache=lambda: None)
                precise = type(kind)(plain, kind.precise)
                precise.write()
                precise.check_depths()
            with self.context.progress.bar(
                f"checking the {kind.form} graph at {kind.precise}", len(self.depths)
            ) as step:
                found = {}
                for depth in self.depths:
                    found[str(depth)] = precise.check_graph(depth, self._references[kind.form][depth])
                    step()
            shutil.rmtree(place, ignore_errors=True)
            write_json(record, found)
        return read_json(record)

    def _quantizes_cache(self, kind: Kind) -> bool:
        return kind.form == "onnx" and self.config.kv != "float32"

    def _rounded_cache(self, kind: Kind) -> dict[str, float]:
        """Depth → KL of the float32 graph with an int8 cache."""
        record = self.work / "rounded-cache.json"
        if not record.exists():
            write_json(record, rounded_cache_kl(kind.making, self.work / "rounded", self._references["onnx"]))
        return read_json(record)

    @cached_property
    def _cache_scales(self) -> CacheScales | None:
        if self.config.kv == "float32":
            return None
        length, data = min(CACHE_ROW, self._shape.positions), self.inputs.stages.get("data")
        rows = partial(calibration_rows, self._tokenizer, data, length)
        file = self.work / "cache-scales.safetensors"
        return kept_scales(file, self._built, rows, self.checkpoint, self.config.threads, self.context.progress)

    @cached_property
    def _shape(self) -> Geometry:
        return geometry_of(load_config(self.checkpoint).to_dict())

    def _family(self, kind: Kind) -> FamilyEntry:
        linked, copied = disk_bytes(self.bundle / kind.root)
        share = linked / kind.size(self.depths[-1]).bytes
        self.context.progress.note(
            f"{kind.role}: {len(self.depths)} depths in {linked / 1e6:.1f} MB, {share:.3f} of the deepest alone"
        )
        return FamilyEntry(
            format=kind.form, type=kind.type, depths=self.depths, bytes=linked, bytes_without_links=copied
        )

    @cached_property
    def _choices(self) -> Choices:
        """The types of files of a size."""
        return Choices(
            self.checkpoint,
            self.name,
            self.depths,
            self.config,
            self.work,
            lambda: self._built,
            lambda: self._measured.sensitivity,
            lambda: self._imatrix,
            self.context.progress,
        )

    @property
    def _built(self) -> Path:
        """The folder with the float32 ONNX graph, which is made when it is first asked for."""
        return build_graph(self.checkpoint, self.work / "built", self.context.progress)

    def _check_disk(self) -> None:
        sizes = [count_parameters(self.checkpoint, depth) for depth in self.depths]
        weights = sizes[-1]
        # Parts of a GGUF that several depths share are links, if there are such; an ONNX weights file is one anyway.
        written = weights if can_link(self.work) else sum(sizes)
        need = sum(written * bits_per_weight(kind, weights, most=True) / 8 for kind in self.config.gguf)
        need += sum(weights * bits_per_weight(kind, weights, most=True) / 8 for kind in self.config.onnx)
        vocabulary = (self.checkpoint / "tokenizer.json").stat().st_size  # each depth has it once more, in either form
        need += vocabulary * len(self.depths) * len([*self.config.gguf, *self.config.onnx])
        if self.config.onnx:
            need += 4 * weights  # the float32 graph that the others are made from
        if self.config.gguf and "F16" not in self.config.gguf:
            need += 2 * weights  # for the check of the graph, deleted again
        free = shutil.disk_usage(self.work).free
        if need > free:
            raise UserError(
                f"exporting {self.name} needs about {need / 1e9:.1f} GB in {self.bundle.parent}, but only "
                f"{free / 1e9:.1f} GB are free; free some space or export fewer types"
            )

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.checkpoint)

    @cached_property
    def _references(self) -> dict[str, dict[int, Reference]]:
        """The checkpoint's predictions on each format's probe text, at each depth."""
        return self._measured.references

    @cached_property
    def _imatrix(self) -> dict[str, Any] | None:
        """Mean squared inputs of every matrix; a block's are the same at every depth that includes it."""
        return self._measured.imatrix

    @cached_property
    def _measured(self) -> MeasuredCheckpoint:
        found = self._measure()
        give_back_memory()  # of the model, whose modules refer to each other
        return found

    def _measure(self) -> MeasuredCheckpoint:
        model = load_model(self.checkpoint, self.context.dtype, self.context.device)
        references: dict[str, dict[int, Reference]] = {}
        for form in ("gguf", "onnx"):
            if getattr(self.config, form):
                references[form] = self._probed(model, form)
        return MeasuredCheckpoint(references, self._weighed(model), self._sensed(model))

    def _probed(self, model: CausalModel, form: str) -> dict[int, Reference]:
        settings, tokenizer = self.config.verify, self._tokenizer
        longest = model.config.max_position_embeddings
        context = context_length(model.config) if form == "gguf" else longest
        if context < SHORTEST:
            raise UserError(
                f"llama.cpp has no sliding window for {model.config.model_type}, so a GGUF would be limited to the "
                f"window's {context} tokens, which is too short. Export ONNX, which supports the window"
            )
        data = self.inputs.stages.get("data")
        windows = probe_windows(tokenizer, data, settings.tokens, min(settings.window, context))
        heads = load_heads(self.checkpoint, model.config) if has_heads(self.checkpoint) else None
        found = {}
        for depth in self.depths:
            with without_blocks(model, range(depth, self.depths[-1])):
                reference = torch_reference(model, windows, heads)
                far: list[ScoringWindow] = []
                if form == "gguf" or by_length(model.config):  # else ONNX takes the positions of a text with a gap
                    far = far_windows(tokenizer, model.config, context, count_parameters(self.checkpoint, depth))
                gapped = gapped_reference(model, tokenizer, longest) if form == "onnx" else None
                long = None
                if form == "onnx" and self.config.kv != "float32":
                    long = torch_reference(
                        model, [long_window(tokenizer, data, min(longest, original_context(model.config)))]
                    )
                found[depth] = replace(
                    reference, far=torch_reference(model, far) if far else None, gapped=gapped, long=long
                )
        return found

    @cached_property
    def _carried(self) -> Importance | None:
        """The importance matrix that the checkpoint was trained with; another would round it otherwise."""
        return None if self.config.imatrix is False else carried_imatrix(self.checkpoint)

    def _wants_imatrix(self) -> bool:
        return self._carried is not None or self.config.weighted("data" in self.inputs.stages)

    def _weighed(self, model: CausalModel) -> Importance | None:
        if self._carried is not None or not self._wants_imatrix():
            return self._carried
        file, tokens = self.work / "imatrix.safetensors", self.config.imatrix_tokens
        return kept_imatrix(file, model, self._tokenizer, self.inputs, tokens, self.context.progress)

    def _sensed(self, model: CausalModel) -> Sensitivity | None:
        """How much each matrix's errors matter, if a size asks for it."""
        if not self._choices.needs_damage:
            return None
        file, seed = self.work / "sensitivity.safetensors", self.context.seed
        return kept_sensitivity(file, model, self._tokenizer, self.inputs, seed, self.context.progress)

    def _note(self, entry: ArtifactEntry) -> None:
        v = entry.verification
        self.context.progress.note(
            f"{entry.role}: {entry.bytes / 1e6:.1f} MB, verified in {v.runtime}: perplexity {v.perplexity:.2f} "
            f"(checkpoint {v.checkpoint_perplexity:.2f}), KL {v.kl:.4f}"
        )
