"""The strongest rivals of exported files: the unpruned model, quantized to at most their bytes.

Evaluation sets them beside the artifacts; this module is the only one of export that it uses. The files are made in a
working folder, by the code that makes artifacts, and deleted once they were measured.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.files import read_json, write_json
from ..core.memory import give_back_memory
from ..core.stage import Context, Inputs
from ..modeling.load import load_config, load_model, load_tokenizer
from ..modeling.weights import count_parameters
from ..records.bundle import BundleManifest
from ..records.manifest import StageManifest
from ..records.models import ArtifactFormat
from ..runtime.artifact_sizes import Target, target_of
from ..runtime.llamacpp_engine import LlamaCppEngine
from .artifacts import GgufKind, Kind, Making, OnnxKind
from .bundle import Size
from .choices import Choices
from .config import ExportConfig
from .cost import RIVAL_TOKENS, RIVAL_WINDOW, RIVALS_TRIED
from .gguf import check_gguf, context_length
from .gguf_sizes import distinct_types, plain_sizes
from .imatrix import kept_imatrix, load_imatrix
from .onnx import build_graph, check_onnx
from .onnx_sizes import onnx_sizes
from .sensitivity import Sensitivity
from .sensitivity_rows import kept_sensitivity
from .verify import TOP_K, Reference, compare, probe_windows, torch_reference

ANY_TYPE = ExportConfig(gguf=["F16"], onnx=["fp32"])  # for its threads: types are asked for one by one
STEP = 10_000  # bytes that sizes are rounded down to


def rounded(limit: int) -> int:
    """The size that a file of at most `limit` bytes is asked to have, so that its name is short."""
    return limit // STEP * STEP


def imatrix_tokens(bundle: Path) -> int:
    """How many tokens the importance matrix of a bundle was computed from; 0 where it had none. Of a bundle that no
    longer lies in its export stage's folder the number is not known: the usual one is taken."""
    if not BundleManifest.read(bundle).importance_matrix:
        return 0
    stage = StageManifest.read_if_there(bundle.parent)
    usual = ExportConfig.model_fields["imatrix_tokens"].default
    return stage.config.get("imatrix_tokens", usual) if stage is not None else usual


class UnprunedModels:
    """The unpruned model in plain types and, of a size, with a type per tensor, made in `work` when they are asked for;
    a killed run goes on from there.

    `imatrix_tokens` is how many tokens of the data stage's training rows the importance matrix is computed from, as in
    the export that the rivals stand beside; 0: there is none.
    """

    def __init__(self, inputs: Inputs, work: Path, context: Context, imatrix_tokens: int):
        self.inputs, self.context, self.imatrix_tokens = inputs, context, imatrix_tokens
        self.base, self.work = inputs.base, work
        self.blocks = load_config(inputs.base).num_hidden_layers
        self.parameters = count_parameters(inputs.base)
        self._sizes: dict[ArtifactFormat, dict[str, int]] = {}
        work.mkdir(parents=True, exist_ok=True)

    def problem(self, form: ArtifactFormat, longest: int) -> str | None:
        """Why the unpruned model cannot be measured in a format, on texts of up to `longest` tokens; None if it can."""
        config = load_config(self.base)
        try:
            check_gguf(self.base) if form == "gguf" else check_onnx(config)
        except UserError as error:
            return str(error)
        if form == "gguf" and context_length(config) < longest <= config.max_position_embeddings:
            return f"llama.cpp runs it on {context_length(config)} tokens at most, and texts here have {longest}"
        return None

    def sizes(self, form: ArtifactFormat) -> dict[str, int]:
        """The bytes of every plain type, smallest first; of ONNX within a percent."""
        if form not in self._sizes:
            found = self._gguf_sizes() if form == "gguf" else onnx_sizes(self.base)
            self._sizes[form] = dict(sorted(found.items(), key=lambda item: item[1]))
        return self._sizes[form]

    def _gguf_sizes(self) -> dict[str, int]:
        weighted = self.imatrix_tokens > 0
        sizes = plain_sizes(self.base, weighted, name=self._name)
        return {kind: sizes[kind] for kind in distinct_types(self.base, weighted) if kind in sizes}

    def fitting(self, form: ArtifactFormat, limit: int) -> list[str]:
        """The plain types of at most `limit` bytes, largest first."""
        return [kind for kind, size in reversed(self.sizes(form).items()) if size <= limit]

    @cached_property
    def smallest(self) -> int:
        """Bytes of the smallest GGUF file that there can be, with a type per tensor."""
        return self._choices.smallest_gguf

    def per_tensor(self, form: ArtifactFormat, limit: int, sized: bool) -> bool:
        """Whether a GGUF file of `limit` bytes with a type per tensor is made too: beside an artifact that is `sized`
        like that, and where no plain type is as small."""
        return form == "gguf" and (sized or not self.fitting(form, limit)) and self.smallest <= rounded(limit)

    def tried(self, form: ArtifactFormat, limit: int, sized: bool = False) -> list[str]:
        """What is made to find the best: a type per tensor, and the largest plain types; of ONNX, whose few precisions
        are far apart, the largest."""
        if form == "onnx":
            return self.fitting(form, limit)[:1]
        own = [Target(bytes=rounded(limit)).name] if self.per_tensor(form, limit, sized) else []
        return [*own, *self.fitting(form, limit)[:RIVALS_TRIED]]

    def check_disk(self, wanted: Iterable[tuple[ArtifactFormat, int, bool]]) -> None:
        """`UserError` where the files for one of `wanted`, what `tried` takes, do not fit the disk."""
        need = 0
        for form, limit, sized in wanted:
            kinds = self.tried(form, limit, sized)
            graph = 4 * self.parameters if form == "onnx" and kinds else 0  # that the others are made from
            need = max(need, graph + sum(self.sizes(form).get(kind, limit) for kind in kinds))
        free = shutil.disk_usage(self.work).free
        if need > free:
            raise UserError(
                f"measuring the unpruned model at the artifacts' sizes needs about {need / 1e9:.1f} GB in {self.work}, "
                f"but only {free / 1e9:.1f} GB are free; free some space or set evaluate.rival to false"
            )

    def best(self, form: ArtifactFormat, limit: int, sized: bool = False) -> str | None:
        """The best of at most `limit` bytes, a plain type or a size; None where none is as small.

        Of several GGUF files the one that is nearest to the unpruned model on a few windows of training rows: a larger
        file is not always the better one. The file of the best stays in the working folder, the others go.
        """
        kinds = self.tried(form, limit, sized)
        if kinds and target_of(kinds[0]) is not None:
            try:
                _ = self._sensitivity
            except UserError as error:
                self.context.progress.note(f"no rival with a type per tensor: {error}")
                del kinds[0]
        if form == "onnx":
            return next((kind for kind in kinds if self._onnx_fits(kind, limit)), None)
        if len(kinds) < 2:
            return next(iter(kinds), None)
        best = min(kinds, key=self._damage)  # the first, so the larger one, of equals
        for kind in kinds:
            if kind != best:
                self.discard(form, kind)
        return best

    def file(self, form: ArtifactFormat, kind: str) -> tuple[Path, Size]:
        """The file or folder of a type, made unless it is there, and its size."""
        maker = self._maker(form, kind)
        file = maker.file(self.blocks)
        if not file.exists():
            maker.clear()
            maker.write()
        return file, maker.size(self.blocks)

    def discard(self, form: ArtifactFormat, kind: str) -> None:
        """Delete the file of a type."""
        self._maker(form, kind).clear()

    def _maker(self, form: ArtifactFormat, kind: str) -> Kind:
        return GgufKind(self._making, kind) if form == "gguf" else OnnxKind(self._making, kind)

    @property
    def _name(self) -> str:
        return self.inputs.name.rsplit("/", 1)[-1]

    @cached_property
    def _choices(self) -> Choices:
        return Choices(
            self.base,
            self._name,
            [self.blocks],
            ANY_TYPE,
            self.work,
            self._built,
            lambda: self._sensitivity,
            self._imatrix,
            self.context.progress,
        )

    @cached_property
    def _sensitivity(self) -> Sensitivity:
        """How much each matrix's errors matter, from the rows that the artifacts' was measured on."""
        file = self.work / "sensitivity.safetensors"
        model, tokenizer = load_model(self.base, self.context.dtype, self.context.device), load_tokenizer(self.base)
        found = kept_sensitivity(file, model, tokenizer, self.inputs, self.context.seed, self.context.progress)
        del model
        give_back_memory()
        return found

    def _built(self) -> Path:
        return build_graph(self.base, self.work / "built", self.context.progress)

    @cached_property
    def _making(self) -> Making:
        return Making(
            checkpoint=self.base,
            bundle=self.work,
            name=self._name,
            depths=[self.blocks],
            config=ANY_TYPE,
            progress=self.context.progress,
            imatrix=self._imatrix,
            choices=self._choices,
            tokenizer=lambda: load_tokenizer(self.base),
            built=self._built,
            temporary=True,
            place=self.context.place,
        )

    def _onnx_fits(self, kind: str, limit: int) -> bool:
        """Whether the folder is as small as it was reckoned to be."""
        record = self.work / f"onnx-{kind}.json"
        if not record.exists():
            write_json(record, {"bytes": self.file("onnx", kind)[1].bytes})
        if read_json(record)["bytes"] <= limit:
            return True
        self.discard("onnx", kind)
        return False

    def _damage(self, kind: str) -> float:
        """KL(unpruned ‖ type) in nats per token on a few windows of training rows, in llama.cpp."""
        record = self.work / f"gguf-{kind}.json"
        if not record.exists():
            reference = self._reference
            longest = max(len(window.ids) for window in reference.windows)
            file, size = self.file("gguf", kind)
            # One slot: how texts share a batch depends on timing, and with it the last digits.
            with LlamaCppEngine(file, context=max(longest + 8, 256), slots=1, place=self.context.place) as engine:
                found = compare(reference, engine.score(reference.windows, top_k=TOP_K))["kl"]
            write_json(record, {"kl": found})
            self.context.progress.note(f"unpruned in {kind}: {size.bytes / 1e6:.1f} MB, KL {found:.4f}")
        return read_json(record)["kl"]

    def _imatrix(self) -> dict[str, Any] | None:
        if not self.imatrix_tokens:
            return None
        if not self._imatrix_file.exists():
            _ = self._reference  # for which the model is loaded, and weighed
        return load_imatrix(self._imatrix_file)

    @property
    def _imatrix_file(self) -> Path:
        return self.work / "imatrix.safetensors"

    @cached_property
    def _reference(self) -> Reference:
        """The unpruned model's distributions on the windows that types are compared on. While it is loaded, the
        importance matrix is collected too."""
        model, tokenizer = load_model(self.base, self.context.dtype, self.context.device), load_tokenizer(self.base)
        length = min(RIVAL_WINDOW, context_length(model.config))
        windows = probe_windows(tokenizer, self.inputs.stages.get("data"), RIVAL_TOKENS, length, "train")
        reference = torch_reference(model, windows)
        if self.imatrix_tokens and not self._imatrix_file.exists():
            file, label = self._imatrix_file, "importance matrix, unpruned"
            kept_imatrix(file, model, tokenizer, self.inputs, self.imatrix_tokens, self.context.progress, label)
        del model
        give_back_memory()
        return reference

    def close(self) -> None:
        """Delete the working folder."""
        shutil.rmtree(self.work, ignore_errors=True)
