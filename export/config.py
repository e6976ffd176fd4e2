"""The recipe's `export` section."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
    model_validator,
)

from ..core.stage import Section
from ..core.suggest import did_you_mean
from ..runtime.artifact_sizes import PATTERN, Target, target_of
from ..runtime.artifact_types import ARTIFACT_TYPES, GGUF_TYPES, ONNX_CACHES, ONNX_TYPES

FORMAT = 5
FEW_BITS = 6  # per weight of a file: with more, rounding costs so little that training gains nothing


def _sized(value: Any, plain: ValidatorFunctionWrapHandler) -> str:
    """{size: 80MB}, {bits: 4.3} and their names 80MB and 4.3bits as the latter; else one of the plain types."""
    if isinstance(value, dict):
        value = _named(value)
    target = target_of(value) if isinstance(value, str) else None
    return target.name if target is not None else plain(value)


def _named(value: dict[str, Any]) -> str:
    (key, given), *more = value.items() or [("", None)]
    if more or key not in ("size", "bits"):
        near = did_you_mean(str(key), ("size", "bits")) if not more else ""
        raise ValueError(f"a size instead of a type is {{size: 80MB}} or {{bits: 4.3}}{near}")
    number = float(given) if isinstance(given, int | float) and not isinstance(given, bool) else None
    if key == "bits":
        if number is None or not 0 < number <= 32:
            raise ValueError(f"bits: {given!r} is no number of bits per weight, such as 4.3")
        return Target(bits=number).name
    name = f"{given}B" if number is not None else given
    target = target_of(name) if isinstance(name, str) else None
    if target is None or target.bytes is None:
        raise ValueError(f"size: {given!r} is no size, such as 80MB or 1.2GB")
    return target.name


def _few_bits(name: str) -> bool:
    """Whether a type has so few bits that training its scales pays; of a size in bytes that is assumed."""
    target = target_of(name)
    bits = ARTIFACT_TYPES[name].typical if target is None else target.bits
    return bits is None or bits < FEW_BITS


NUMBER = {"type": "number", "exclusiveMinimum": 0}
SIZED = {
    "type": "object",
    "additionalProperties": False,
    "minProperties": 1,
    "maxProperties": 1,
    "properties": {"size": {"anyOf": [{"type": "string", "pattern": PATTERN}, NUMBER]}, "bits": NUMBER},
}


def _schema(types: Iterable[str]) -> WithJsonSchema:
    """A list of types and sizes, or one size."""
    one = {"anyOf": [{"enum": list(types), "type": "string"}, {"type": "string", "pattern": PATTERN}, SIZED]}
    return WithJsonSchema({"anyOf": [{"type": "array", "items": one}, SIZED]})


if TYPE_CHECKING:
    GgufType = OnnxPrecision = KvType = str
else:
    GgufType, OnnxPrecision = Literal[tuple(GGUF_TYPES)], Literal[tuple(ONNX_TYPES)]
    KvType = Literal[ONNX_CACHES]
OneIsAList = BeforeValidator(lambda value: [value] if isinstance(value, dict) else value)
GgufTargets = Annotated[list[Annotated[GgufType, WrapValidator(_sized)]], OneIsAList, _schema(GGUF_TYPES)]
OnnxTargets = Annotated[list[Annotated[OnnxPrecision, WrapValidator(_sized)]], OneIsAList, _schema(ONNX_TYPES)]


class Verify(Section):
    """How exported files are compared with the checkpoint in the stock runtimes."""

    tokens: int = Field(default=192, ge=8, description="positions whose next-token distributions are compared")
    window: int = Field(default=96, ge=8, description="tokens per probe text")
    kl: dict[Annotated[GgufType | OnnxPrecision, WrapValidator(_sized)], float] = Field(
        default_factory=dict,
        description="limit on the mean KL(checkpoint ‖ artifact) per type, such as {Q4_K_M: 0.05}; overrides defaults",
    )
    kv: float = Field(
        default=0.02,
        gt=0,
        description="limit on the mean KL(checkpoint ‖ float32 graph with an int8 cache): what rounding keys and "
        "values may cost, on top of the type's own limit",
    )


class TrainScales(Section):
    """Training the scales of quantized files by the KL to the checkpoint, with their integer codes fixed
    (EfficientQAT's second phase, arXiv 2407.11062): the files keep their size and lose less."""

    steps: int = Field(default=60, ge=1, description="optimizer steps")
    batch: int = Field(default=2, ge=1, description="rows of the data stage per step")
    length: int = Field(default=512, ge=8, description="tokens of a row, at most")
    lr: float = Field(default=1.5e-3, gt=0, lt=0.1, description="peak learning rate, relative to a scale")
    warmup: float = Field(default=0.08, ge=0, lt=1, description="share of the steps over which the rate rises")
    eval_every: int = Field(default=20, ge=1, description="steps between measurements on the held-out rows")
    held_out: int = Field(default=4096, ge=64, description="tokens of the held-out rows to choose by, at most")
    gradient_checkpointing: bool = Field(default=False, description="recompute activations in the backward pass")
    types: list[Annotated[GgufType | OnnxPrecision, WrapValidator(_sized)]] | None = Field(
        default=None, min_length=1, description="types to train; null: those listed of fewer than six bits per weight"
    )


class ExportConfig(Section):
    """Which artifacts the bundle holds, and how they are quantized and checked."""

    gguf: GgufTargets = Field(
        default_factory=list,
        description=f"GGUF types: {', '.join(GGUF_TYPES)}; or sizes, for which every tensor gets a type of its own: "
        "{size: 80MB} for the whole file, or {bits: 4.3} per weight",
    )
    onnx: OnnxTargets = Field(
        default_factory=list,
        description=f"ONNX precisions: {', '.join(ONNX_TYPES)}; or sizes, for which every matrix gets bits and "
        "blocks of its own: {size: 80MB} for the whole folder, or {bits: 4.3} per weight",
    )
    depths: list[Annotated[int, Field(ge=1)]] | None = Field(
        default=None,
        min_length=1,
        description="depths to export, in blocks, ascending and ending with all blocks, such as [12, 18, 24]; null: "
        "the depths the model was trained for, else its full depth alone",
    )
    imatrix: bool | None = Field(
        default=None,
        description="weight rounding errors by an importance matrix from the data stage's rows; null: if there is one",
    )
    kv: KvType = Field(
        default="float32",
        description="how ONNX artifacts hold keys and values: float32, or int8 in a quarter of the memory, with scales "
        "measured on the data stage's rows (without one on a short built-in text)",
    )
    imatrix_tokens: int = Field(default=8192, ge=64, description="tokens the importance matrix is computed from")
    train_scales: TrainScales | None = Field(
        default=None, description="train the scales of quantized files on the data stage's rows; null: do not"
    )
    verify: Verify = Field(default_factory=Verify, description="comparison with the checkpoint; always runs")
    threads: int = Field(default=0, ge=0, description="CPU threads; 0: all cores")

    @model_validator(mode="after")
    def _something(self) -> ExportConfig:
        if not self.gguf and not self.onnx:
            raise ValueError("name at least one type under gguf or onnx")
        for values in (self.gguf, self.onnx):
            if len(set(values)) != len(values):
                raise ValueError(f"{values} lists a type twice")
        if self.kv != "float32" and not self.onnx:
            raise ValueError(f"kv: {self.kv} is for ONNX, and no type is named under onnx; add one, or remove the key")
        if self.depths is not None and sorted(set(self.depths)) != self.depths:
            raise ValueError(f"depths {self.depths} must be in ascending order, each once")
        return self

    @model_validator(mode="after")
    def _scales_to_train(self) -> ExportConfig:
        if self.train_scales is None:
            return self
        types = self.train_scales.types
        listed = [*self.gguf, *self.onnx]
        for name in types or ():
            if name not in listed:
                raise ValueError(f"train_scales.types: {name} is not exported; listed are {', '.join(listed)}")
            if name in ARTIFACT_TYPES and not ARTIFACT_TYPES[name].has_scales:
                raise ValueError(f"train_scales.types: {name} has no scales to train: its weights are not quantized")
        if not self.trained:
            raise ValueError(
                f"train_scales: none of {', '.join(listed)} has fewer than six bits per weight; list a type of 4 bits, "
                "name one under train_scales.types, or remove the key"
            )
        return self

    @property
    def trained(self) -> list[str]:
        """The types whose scales are trained."""
        if self.train_scales is None:
            return []
        return self.train_scales.types or [name for name in (*self.gguf, *self.onnx) if _few_bits(name)]

    def weighted(self, data: bool) -> bool:
        """Whether there is an importance matrix, going by whether there is a data stage."""
        return data if self.imatrix is None else self.imatrix and data

    def unweighted(self, data: bool) -> Iterator[tuple[tuple[str | int, ...], str]]:
        """(path of keys, what is wrong) where an importance matrix is needed and there is none."""
        if self.imatrix and not data:
            yield ("imatrix",), "is true, but there are no rows to compute it from; add `data:` or remove the key"
        for place, kind in enumerate(self.gguf):
            if kind in GGUF_TYPES and GGUF_TYPES[kind].needs_importance and not self.weighted(data):
                why = "imatrix is false" if data else "there are no rows (a recipe's `data:`) to compute it from"
                yield ("gguf", place), f"{kind} needs an importance matrix, and {why}; choose a type with more bits"

    def misfits(self, sections: Mapping[str, Any]) -> Iterable[tuple[tuple[str | int, ...], str]]:
        yield from self.unweighted("data" in sections)
        if self.train_scales is not None and "data" not in sections:
            yield ("train_scales",), "it learns from the data stage's rows; add `data:`, or remove the key"
