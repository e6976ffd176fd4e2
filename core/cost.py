"""A stage's cost, estimated from configuration alone: the contract of every stage's `cost.py`. No torch.

`<area>/cost.py` has a `COST: StageCost`, whose functions are given the stage's section and the `Setting` that the
stages before it leave. `compress plan` goes through a recipe's stages in order and adds up their estimates.
Constants that a stage's code and its costs share stand in its `cost.py`, and the code takes them from there.

On a CPU memory is the resident set, as a run measures it: weights of a safetensors file count once they were touched,
because the file is mapped; so does any other mapped file. On CUDA it is what torch allocates, and the context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from .geometry import Geometry
from .stage import check_deepest
from .work import Work

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}  # of a number, by dtype
NF4, INT8 = 0.56, 1.06  # bytes per weight, block scales included
GRADIENT = 4  # bytes per trained weight
MOMENTS = {"adamw": 8, "adamw_8bit": 2}  # bytes per trained weight, by optimizer
CUDA_CONTEXT = 800e6  # assumed: context and cuBLAS workspaces
PARTS = ("runtime", "weights", "teacher", "adapters", "optimizer", "activations", "kv", "logits", "other", "mapped")
Parts = dict[str, int]  # of PARTS, in bytes


@dataclass(frozen=True)
class RowCounts:
    """The rows a data stage leaves, if every row is as long as it may be."""

    tokens: int  # of all rows, training and held out
    heldout: float  # share of them that is held out
    targets: int  # tokens to measure on in the held-out rows, at most


@dataclass(frozen=True)
class Setting:
    """The model as a stage finds it, how its weights are held, and what the stages before have left."""

    shape: Geometry  # of the unpruned model
    kept: int  # blocks that the model has by now
    dtype: str
    cuda: bool = False
    shards: int = 1  # processes that full tuning is spread over; memory is that of one
    room: int | None = None  # bytes of memory that there are, if that is known
    exact: bool = True  # whether `kept` is known; else it is an upper bound
    rows: RowCounts | None = None  # of the data stage, where their number is known
    recovered: bool = False  # whether training has changed every linear layer
    variants: int = 1  # students, to be merged
    depths: tuple[int, ...] = ()  # that the model was sorted for
    measured: tuple[int, ...] = ()  # blocks of each checkpoint that an evaluation measures
    artifacts: tuple[tuple[str, int], ...] = ()  # type and blocks of each exported file

    @property
    def size(self) -> int:
        """Bytes of a weight."""
        return BYTES[self.dtype]

    @property
    def whole(self) -> int:
        """Bytes of the unpruned model."""
        return self.shape.parameters(self.shape.blocks) * self.size

    @property
    def small(self) -> int:
        """Bytes of the model as it is by now."""
        return self.shape.parameters(self.kept) * self.size

    def runtime(self, size: float) -> int:
        """What a process holds without a model: `size` bytes; beside a card its context is meant."""
        return int(CUDA_CONTEXT if self.cuda else size)

    def check_depths(self, key: str, depths: list[int]) -> None:
        """`UserError` unless the depths that the recipe's `key` names end with all blocks there are, if that is
        known."""
        if self.exact:
            check_deepest(key, depths, self.kept, "the pruned model" if self.kept < self.shape.blocks else "the model")


@dataclass(frozen=True)
class Need:
    """One stage's memory, part by part at the worst moment; the disk it fills; and a word on it."""

    parts: Parts
    disk: int = 0  # bytes that it leaves
    note: str = ""
    scratch: int = 0  # bytes on disk while it works
    host: int = 0  # of a stage on a GPU: bytes of the machine's own memory

    @property
    def peak(self) -> int:
        """What a run will show."""
        return sum(self.parts.values())

    @property
    def needed(self) -> int:
        """What there has to be: pages of a mapped scratch file are given back when memory is short."""
        return self.peak - self.parts.get("mapped", 0)


def worst(*moments: Parts) -> Parts:
    """The moment that holds most, its parts in order and without empty ones."""
    most = max(moments, key=lambda parts: sum(parts.values()))
    return {name: int(most[name]) for name in PARTS if most.get(name)}


Overrides = tuple[str, ...]  # as `--set` takes them
C = TypeVar("C")


def _leaves_all_as_it_is(_config: object, at: Setting) -> Setting:
    return at


def _no_changes(_config: object, _at: Setting) -> Iterable[Overrides]:
    return ()


def _all_cards(_config: object, cards: int) -> int:
    return cards


@dataclass(frozen=True)
class StageCost(Generic[C]):
    """What a stage says of itself, from its section of type C and the setting it finds. `UserError` where a section
    does not fit the model."""

    need: Callable[[C, Setting], Need]
    work: Callable[[C, Setting], Work | None]  # None where it cannot be told from the recipe
    leaves: Callable[[C, Setting], Setting] = _leaves_all_as_it_is  # the setting that the next stage finds
    changes: Callable[[C, Setting], Iterable[Overrides]] = _no_changes  # that need less memory, cheapest first
    cards: Callable[[C, int], int] = _all_cards  # of so many, those that share the work, if the stage is parallel


def halves(value: int, least: int) -> Iterable[int]:
    """A half of the value, a quarter …, down to `least`."""
    while value // 2 >= least:
        value //= 2
        yield value
