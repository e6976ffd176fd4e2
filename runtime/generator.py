"""The interface for generating text at several depths in one process, whatever the runtime. Works on token ids."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Self

from ..core.errors import UserError

Finish = Literal["stop", "length"]
Tokens = abc.Generator[int, None, None]


@dataclass(frozen=True)
class Request:
    """The tokens to continue, and how."""

    ids: Sequence[int]
    max_tokens: int
    depth: int
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0
    seed: int = 0
    stop: frozenset[int] = frozenset()  # tokens that end the text and are not yielded
    draft_depth: int | None = None  # this depth drafts, `depth` verifies
    draft_tokens: int = 4  # how many at a time
    exits: Mapping[int, float] = field(default_factory=dict)  # depth -> probability above which its token is taken


@dataclass
class RequestWork:
    """A request's time and token counts; filled while it is worked on."""

    finish: Finish = "length"
    reused: int = 0  # prompt tokens whose keys and values were already cached
    drafted: int = 0
    accepted: int = 0  # drafted tokens that the full depth would have written as well
    depths: Counter[int] = field(default_factory=Counter)  # how many tokens each depth decided


class Generator(ABC):
    """One artifact type of a bundle, open in a runtime, at every depth asked for."""

    runtime: str
    device: str = "cpu"  # what it runs on
    depths: tuple[int, ...]  # ascending
    context: int  # the longest text in tokens, prompt and answer together

    @abstractmethod
    def generate(self, request: Request, work: RequestWork) -> Tokens:
        """Up to `max_tokens` new tokens, as they are generated.

        The prefix shared with the previous text is not read again. Raises `UserError` for unknown depths.
        """

    @abstractmethod
    def close(self) -> None:
        """Free the memory; closing twice does nothing."""

    @property
    def processes(self) -> tuple[int, ...]:
        """Ids of processes that it started."""
        return ()

    def check(self, request: Request) -> None:
        """Raise `UserError` for invalid options and unknown depths."""
        check_depth(request.depth, self.depths)
        if request.draft_depth is not None:
            check_depth(request.draft_depth, self.depths)
            if request.draft_depth >= request.depth:
                raise UserError(f"draft depth {request.draft_depth} must be less than depth {request.depth}")
            if request.draft_tokens < 1:
                raise UserError(f"draft tokens must be at least 1, not {request.draft_tokens}")
        for depth, confidence in request.exits.items():
            check_depth(depth, self.depths)
            if not 0 <= confidence <= 1:
                raise UserError(f"the exit probability at depth {depth} must be between 0 and 1, not {confidence}")
        if request.exits and request.draft_depth is not None:
            raise UserError("drafting and early exit cannot be combined: choose one")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_depth(depth: int, depths: Sequence[int]) -> None:
    """Raise `UserError` unless the depth is one of `depths`."""
    if depth not in depths:
        raise UserError(f"there is no depth {depth} here; there are: {', '.join(map(str, depths))}")
