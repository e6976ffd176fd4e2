"""Building one type of artifact at all its depths: GGUF, and ONNX."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from gguf import GGMLQuantizationType

from ..core.place import ANYWHERE, Place
from ..core.stage import Progress
from ..modeling.weights import count_parameters
from ..records.bundle import Verification
from ..runtime.artifact_sizes import target_of
from ..runtime.artifact_types import GGUF_TYPES, ONNX_TYPES
from ..runtime.genai_engine import GenaiEngine
from ..runtime.llamacpp_engine import LlamaCppEngine
from ..runtime.onnx_engine import OnnxEngine
from . import gguf_family, onnx_depths, onnx_retaining
from .bundle import Size
from .choices import Choices
from .config import ExportConfig
from .ends import check_gguf_texts, check_onnx_texts, end_tokens
from .gguf import write_gguf
from .gguf_family import family_name, measure_gguf, write_family
from .grids import Grid
from .onnx import write_onnx
from .onnx_depths import depth_folder, measure_onnx
from .onnx_kv import CacheScales
from .scale_files import GgufScales, OnnxScales, ScaleFiles
from .sized import Chosen
from .tensors import gguf_errors, onnx_errors
from .verify import (
    PROBE,
    Reference,
    check_cache,
    check_ends,
    check_gapped,
    check_graph,
    check_in_one,
    check_retaining,
    check_runtime,
    check_tokens,
    coarser,
    kl_limit,
)


@dataclass(frozen=True)
class Making:
    """What all artifact types of a bundle share while it is built."""

    checkpoint: Path
    bundle: Path
    name: str  # of the model
    depths: Sequence[int]  # ascending to all blocks
    config: ExportConfig
    progress: Progress
    imatrix: Callable[[], dict[str, Any] | None]
    choices: Choices | None  # the types of the tensors of files of a size; None: there are no such files
    tokenizer: Callable[[], Any]
    built: Callable[[], Path]  # the folder with the float32 ONNX graph, which is made when it is first asked for
    cache: Callable[[], CacheScales | None] = lambda: None  # None: keys and values in float32
    temporary: bool = False  # for verification alone
    place: Place = ANYWHERE  # where files are run to verify them

    @property
    def sizes(self) -> Choices:
        assert self.choices is not None, "without sizes there is nothing to choose"
        return self.choices


class Kind(ABC):
    """One type: where its files are, how they are written, read back and run."""

    form: Literal["gguf", "onnx"]
    precise: str  # the type at which a wrong graph cannot pass for rounding

    def __init__(self, making: Making, type: str):
        self.making, self.type = making, type
        self.sized = target_of(type) is not None

    @property
    def role(self) -> str:
        """The artifact's role at the greatest depth."""
        return f"{self.form}-{self.type}"

    def role_at(self, depth: int) -> str:
        return self.role if depth == self.making.depths[-1] else f"{self.role}@{depth}"

    @property
    @abstractmethod
    def chosen(self) -> Chosen[Any] | None:
        """The types of the tensors of a file of a size; None for a plain type."""

    @property
    def like(self) -> str:
        """The plain type whose limits apply: the type itself; of a size, that with the largest file that fits it."""
        return self.type if self.chosen is None else self.chosen.like

    @property
    def limit(self) -> float:
        """On the mean KL to the checkpoint."""
        return kl_limit(self.type, self.like, self.making.config.verify.kl)

    @property
    def several(self) -> bool:
        return len(self.making.depths) > 1

    @property
    @abstractmethod
    def root(self) -> str:
        """The file or folder of all depths, relative to the bundle."""

    @abstractmethod
    def path(self, depth: int) -> str:
        """The path a runtime opens, relative to the bundle."""

    @abstractmethod
    def size(self, depth: int) -> Size: ...

    @abstractmethod
    def write(self) -> None: ...

    @abstractmethod
    def check_depths(self) -> None:
        """Raise `UserError` unless all depths read the same weights."""

    @abstractmethod
    def errors(self) -> Iterator[tuple[str, str, float]]:
        """(tensor, its type, row error) of every tensor written, against the checkpoint."""

    @abstractmethod
    def scales(self) -> ScaleFiles:
        """The scales of the files written."""

    @abstractmethod
    def run(self, depth: int, reference: Reference, tensor_error: float) -> Verification:
        """Check one depth in its real runtime against the checkpoint truncated to that depth."""

    @abstractmethod
    def check_graph(self, depth: int, reference: Reference) -> float:
        """The mean KL of one depth at the type `precise`; `UserError` if it differs from the checkpoint truncated to
        that depth, or has other end-of-text tokens or another chat template."""

    def _tell(self, chosen: Chosen[Any]) -> None:
        self.making.progress.note(f"{self.role}: {chosen}; estimated KL {chosen.damage:.4f}")

    def file(self, depth: int) -> Path:
        return self.making.bundle / self.path(depth)

    def clear(self) -> None:
        """Remove the remains of an earlier attempt."""
        root = self.making.bundle / self.root
        shutil.rmtree(root) if root.is_dir() else root.unlink(missing_ok=True)


class GgufKind(Kind):
    form = "gguf"
    precise = "F16"

    @property
    def root(self) -> str:
        return f"gguf/{self.making.name}-{self.type}{'' if self.several else '.gguf'}"

    def path(self, depth: int) -> str:
        stem = f"{self.making.name}-{self.type}"
        return f"{self.root}/{family_name(stem, depth, 1, self.making.depths)}" if self.several else self.root

    def size(self, depth: int) -> Size:
        return measure_gguf(self.file(depth))

    def write(self) -> None:
        making = self.making
        options: dict[str, Any] = {
            "name": making.name,
            "threads": making.config.threads,
            "progress": making.progress,
        }
        mix, chosen = self.like, self.chosen
        if chosen is not None:
            options |= {"types": chosen.types, "imatrix": chosen.importance}
            self._tell(chosen)
        else:
            options["imatrix"] = making.imatrix() if GGUF_TYPES[mix].calibrated else None
        if self.several:
            write_family(making.checkpoint, making.bundle / self.root, mix, making.depths, **options)
        else:
            write_gguf(making.checkpoint, making.bundle / self.root, mix, **options)

    @property
    def chosen(self) -> Chosen[GGMLQuantizationType] | None:
        return self.making.sizes.gguf(self.type) if self.sized else None

    def check_depths(self) -> None:
        if self.several:
            gguf_family.check_family(self.making.bundle / self.root, self.making.depths)

    def errors(self) -> Iterator[tuple[str, str, float]]:
        *less, deepest = self.making.depths
        whole = [gguf_errors(file, self.making.checkpoint) for file in gguf_family.split_files(self.file(deepest))]
        own = [gguf_errors(self.file(depth), self.making.checkpoint, depth) for depth in less]
        return chain(*whole, *own)

    def scales(self) -> ScaleFiles:
        return GgufScales([self.file(depth) for depth in self.making.depths], self.making.checkpoint)

    def run(self, depth: int, reference: Reference, tensor_error: float) -> Verification:
        making, role = self.making, self.role_at(depth)
        check_gguf_texts(self.file(depth), making.checkpoint)
        with self._engine(depth, reference) as engine:
            expected = making.tokenizer()(PROBE, add_special_tokens=False, verbose=False).input_ids
            check_tokens(role, engine.tokenize(PROBE), expected)
            return check_runtime(role, self.type, engine, reference, self.limit, tensor_error)

    def check_graph(self, depth: int, reference: Reference) -> float:
        with self._engine(depth, reference) as engine:
            found = check_graph(self.form, self.type, engine, reference)
            check_ends(self.role_at(depth), engine, end_tokens(self.making.checkpoint))
        if reference.far is not None:  # in a context of its own: longrope goes by its length
            with self._engine(depth, reference.far) as engine:
                found = max(found, check_graph(self.form, self.type, engine, reference.far))
        return found

    def _engine(self, depth: int, reference: Reference) -> LlamaCppEngine:
        making, longest = self.making, max(len(window.ids) for window in reference.windows)
        # One slot: how texts share a batch depends on timing, and with it the last digits.
        how = {"context": max(longest + 8, 256), "slots": 1, "place": making.place}
        return LlamaCppEngine(self.file(depth), making.config.threads, **how)


class OnnxKind(Kind):
    form = "onnx"
    precise = "fp32"

    @property
    def root(self) -> str:
        return f"onnx/{self.type}"

    def path(self, depth: int) -> str:
        return f"{self.root}/{depth_folder(depth, self.making.depths)}" if self.several else self.root

    def size(self, depth: int) -> Size:
        return measure_onnx(self.file(depth), count_parameters(self.making.checkpoint, depth))

    @property
    def chosen(self) -> Chosen[Grid] | None:
        return self.making.sizes.onnx(self.type) if self.sized else None

    def write(self) -> None:
        making, chosen = self.making, self.chosen
        if chosen is not None:
            self._tell(chosen)
            options: dict[str, Any] = {"grids": chosen.types, "imatrix": chosen.importance}
        else:
            options = {"imatrix": making.imatrix() if ONNX_TYPES[self.type].calibrated else None}
        write_onnx(
            making.checkpoint,
            making.bundle / self.root,
            self.type,
            depths=making.depths,
            built=making.built(),
            link=making.temporary,
            kv=making.cache(),
            progress=making.progress,
            **options,
        )

    def check_depths(self) -> None:
        if self.several:
            onnx_depths.check_family(self.making.bundle / self.root, self.making.depths)
        onnx_retaining.check_heads(self.file(self.making.depths[-1]), self.making.checkpoint)

    def errors(self) -> Iterator[tuple[str, str, float]]:
        return onnx_errors(self.file(self.making.depths[-1]), self.making.checkpoint)

    def scales(self) -> ScaleFiles:
        return OnnxScales(self.file(self.making.depths[-1]), self.making.checkpoint)

    def run(self, depth: int, reference: Reference, tensor_error: float) -> Verification:
        making, role, verify = self.making, self.role_at(depth), self.making.config.verify
        more = verify.kv if making.config.kv == "int8" else 0.0
        check_onnx_texts(self.file(depth), making.checkpoint)
        with OnnxEngine(self.file(depth), making.config.threads) as engine:
            found = check_runtime(role, self.type, engine, reference, self.limit + more, tensor_error)
            if reference.retaining:
                scores = engine.retaining_scores(reference.windows[0].ids)
                kind = self.like if making.config.kv == "float32" else coarser(self.like)
                found.retaining_agreement = check_retaining(role, kind, reference, scores)
        with GenaiEngine(self.file(depth)) as engine:
            # Stock genai, which passes over outputs that it does not know, such as retaining scores.
            few = Reference(reference.windows[:1], reference.scores[:1])
            check_runtime(role, self.type, engine, few, self.limit + more, tensor_error)
        return found

    def check_cache(self, depth: int, reference: Reference) -> float:
        """The mean KL of one depth in float32 with its int8 cache, on the reference's long text; `UserError` past the
        limit."""
        assert reference.long is not None
        with OnnxEngine(self.file(depth), self.making.config.threads) as engine:
            return check_cache(self.role_at(depth), engine, reference.long, self.making.config.verify.kv)

    def check_graph(self, depth: int, reference: Reference) -> float:
        with OnnxEngine(self.file(depth), self.making.config.threads) as engine:
            found = check_graph(self.form, self.type, engine, reference)
            if reference.far is not None:
                found = max(found, check_in_one(self.type, engine, reference.far))
            if reference.gapped is not None:
                found = max(found, check_gapped(self.type, engine, reference.gapped))
        return found
