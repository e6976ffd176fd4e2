"""A stage's cost, estimated from configuration alone: the contract of every stage's `cost.py`. No torch.

`<area>/cost.py` has a `COST: StageCost`, whose functions take the stage's section and the `Setting` left by the stages
before it. `compress plan` goes through a recipe's stages in order and adds up their estimates. Constants that a stage's
code and its costs share are in its `cost.py`, from where the code imports them.

On a CPU, memory means the resident set, as a run measures it: pages of memory-mapped files, weights included, count
once they have been touched. On CUDA it means torch's allocations plus the context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

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
    """The rows of a data stage, if every row has the maximum length."""

    count: int  # of all rows, training and held out
    tokens: int  # of all of them
    heldout: float  # share of them that is held out
    targets: int  # tokens to measure on in the held-out rows, at most
    learned: int = 0  # tokens to learn in the training rows, at most
    longest: int = 0  # tokens of the longest row, at most


class PlannedFile(NamedTuple):
    """An exported file."""

    form: str  # gguf, onnx
    type: str
    blocks: int


@dataclass(frozen=True)
class Setting:
    """The model that a stage receives, how its weights are held, and what earlier stages produced."""

    shape: Geometry  # of the unpruned model
    kept: int  # blocks that the model has at this stage
    dtype: str
    cuda: bool = False
    shards: int = 1  # processes that full tuning is sharded over; memory is per process
    room: int | None = None  # available memory in bytes, if known
    exact: bool = True  # whether `kept` is known; else it is an upper bound
    rows: RowCounts | None = None  # of the data stage, if their number is known
    recovered: bool = False  # whether training has changed every linear layer
    variants: int = 1  # students, to be merged
    depths: tuple[int, ...] = ()  # depths of a sorted model
    measured: tuple[int, ...] = ()  # number of blocks of each checkpoint that an evaluation measures
    artifacts: tuple[PlannedFile, ...] = ()
    weighed: int = 0  # tokens of the importance matrix that they were made with, at most

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
        """Bytes of the model at this stage."""
        return self.shape.parameters(self.kept) * self.size

    def runtime(self, size: float) -> int:
        """Memory of a process without a model: `size` bytes on a CPU; on a GPU that of its context."""
        return int(CUDA_CONTEXT if self.cuda else size)

    def check_depths(self, key: str, depths: list[int]) -> None:
        """`UserError` unless the depths under the recipe's `key` end with the model's number of blocks, if that is
        known."""
        if self.exact:
            check_deepest(key, depths, self.kept, "the pruned model" if self.kept < self.shape.blocks else "the model")


@dataclass(frozen=True)
class Need:
    """One stage's peak memory by part, its disk space, and a note."""

    parts: Parts
    disk: int = 0  # bytes that remain on disk
    note: str = ""
    scratch: int = 0  # temporary bytes on disk
    host: int = 0  # bytes of host memory, for a stage on a GPU

    @property
    def peak(self) -> int:
        """The peak that a run will measure, in bytes."""
        return sum(self.parts.values())

    @property
    def needed(self) -> int:
        """The bytes that must be available; pages of a mapped scratch file can be evicted, so they do not count."""
        return self.peak - self.parts.get("mapped", 0)


def worst(*moments: Parts) -> Parts:
    """The moment with the most memory, its parts in order, without empty ones."""
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
    """A stage's estimates, from its section of type C and its setting. `UserError` if a section does not fit the
    model."""

    need: Callable[[C, Setting], Need]
    work: Callable[[C, Setting], Work | None]  # None if the recipe does not determine it
    leaves: Callable[[C, Setting], Setting] = _leaves_all_as_it_is  # the next stage's setting
    changes: Callable[[C, Setting], Iterable[Overrides]] = (
        _no_changes  # overrides that need less memory, cheapest first
    )
    cards: Callable[[C, int], int] = _all_cards  # how many of the given cards a parallel stage can use


def halves(value: int, least: int) -> Iterable[int]:
    """A half of the value, a quarter, and so on, down to `least`."""
    while value // 2 >= least:
        value //= 2
        yield value
