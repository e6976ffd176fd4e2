"""The stage contract: a stage's inputs and its output.

A stage is a folder with three modules. `config.py` has its configuration class (a `Section`) and `FORMAT: int`, bumped
when the meaning of its output changes; `cost.py` estimates its cost (core/cost.py); both are importable without torch.
`stage.py` has these functions:

    ready(config, context) -> None                         optional; `UserError` for missing libraries, before the model
                                                           is fetched
    check(config, base, context) -> None                   optional; cheap checks before any work is done
                                                           (base: the unpruned model's checkpoint folder)
    run(config, inputs, out_dir, context) -> metrics       reads folders, writes one folder

A stage knows nothing of the pipeline. `out_dir` exists when `run` is called; after a kill `run` gets the same folder
with its contents, so long stages resume from it. `out_dir/.work/` is for resumable state and is deleted on completion;
all else in `out_dir` is the artifact and holds no times and no absolute paths, so that an interrupted run ends with the
same bytes as an uninterrupted one. A stage that makes a model writes it, as a checkpoint folder, to `out_dir/model`.

A run may have several processes (`Context.group`). A stage that can share its work is called in all of them, with the
same folder: each does its part, and rank 0 alone writes the artifact and returns the metrics. Any other stage is called
on rank 0 only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

from pydantic import BaseModel, ConfigDict

from .errors import UserError
from .place import ANYWHERE, Place

WORK = ".work"


class Section(BaseModel):
    """Base of every recipe section: unknown keys are errors, values never change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def methods(self) -> list[type]:
        """Classes of methods that the section only names; packages that added one become part of the fingerprint."""
        return []

    def input_files(self) -> list[str]:
        """Local files and folders named by this section whose content belongs in the stage's fingerprint."""
        return []

    def misfits(self, sections: Mapping[str, Any]) -> Iterable[tuple[tuple[str | int, ...], str]]:
        """(path of keys in this section, problem) for keys that conflict with the recipe's other `sections`."""
        return ()

    def beside(self, sections: Mapping[str, Any]) -> Self:
        """The section, completed with values that it takes from the recipe's other sections."""
        return self


class Advance(Protocol):
    def __call__(self, n: int = 1, note: str = "") -> None: ...


class Progress:
    """Receives a stage's progress. This one is silent; the command line passes one that draws."""

    @contextmanager
    def bar(self, label: str, total: int | None = None) -> Iterator[Advance]:
        """A bar of `total` steps; call the yielded function to advance it, with a short note such as a loss."""

        def advance(n: int = 1, note: str = "") -> None:
            return None

        yield advance

    def note(self, text: str) -> None:
        """Report one line: a count, a choice, a figure."""


class Group:
    """The processes that run a recipe together. Here there is one; `pipeline/group.py` has the class for several."""

    rank: int = 0
    world: int = 1

    def gather(self, value: object) -> list[Any]:
        """The values of all processes (JSON values), in order of rank. All of them must call this, and wait for each
        other."""
        return [value]

    def share(self, value: object) -> Any:
        """Rank 0's value, on all processes. All of them must call this."""
        return self.gather(value if self.rank == 0 else None)[0]

    def barrier(self) -> None:
        """Wait for all processes."""
        self.gather(None)


@dataclass(frozen=True)
class Context:
    """How and where a stage runs, as opposed to what it does."""

    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"  # of weights and activations: float32, bfloat16 or float16
    recipe_dir: Path = field(default_factory=Path.cwd)
    progress: Progress = field(default_factory=Progress)
    group: Group = field(default_factory=Group)
    shard: bool = False  # shard the trained weights over the group
    place: Place = ANYWHERE  # where runtimes run exported models; `device` is torch's

    @property
    def rank(self) -> int:
        """This process's rank; 0 writes the artifact."""
        return self.group.rank

    @property
    def world(self) -> int:
        """The number of processes."""
        return self.group.world

    def resolve(self, path: str) -> Path:
        """A path from the recipe, relative to the recipe's folder."""
        return self.recipe_dir / Path(path).expanduser()


def check_deepest(key: str, depths: Sequence[int], blocks: int, where: str) -> None:
    """`UserError` unless the depths under the recipe's `key` end with the number of blocks of the model that `where`
    names."""
    if depths[-1] != blocks:
        raise UserError(
            f"{key} ends with {depths[-1]}, but {where} has {blocks} blocks; the last depth is the whole model, so "
            f"write [..., {blocks}]" + (f", or prune to {depths[-1]} blocks first" if depths[-1] < blocks else "")
        )


@dataclass(frozen=True)
class Inputs:
    """The folders a stage reads."""

    base: Path  # checkpoint folder of the unpruned model
    model: Path  # checkpoint folder of the latest model; the base if no stage has made one
    stages: dict[str, Path] = field(default_factory=dict)  # finished earlier stages, by name
    name: str = "model"  # of the unpruned model: a Hub id, or the name of a file or folder without its path
