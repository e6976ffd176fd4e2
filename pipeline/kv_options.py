"""The command-line options of a KV budget, for every command that runs a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError

if TYPE_CHECKING:
    from ..runtime.kv_budget import KvBudget

BudgetOption = Annotated[
    int | None,
    typer.Option("--kv-budget", help="Hold so many keys and values per block and KV head; the rest is evicted."),
]
ChunkOption = Annotated[
    int | None, typer.Option("--kv-chunk", help="Tokens read between evictions; as the heads were made for, or 256.")
]
StabilizersOption = Annotated[
    int | None, typer.Option("--kv-stabilizers", help="Newest entries kept at an eviction; as made for, or 64.")
]
LocalOption = Annotated[
    int | None, typer.Option("--kv-local", help="Last tokens of a prompt, always held; as made for, or 100.")
]
PolicyOption = Annotated[
    str | None, typer.Option("--kv-policy", help="What stays: retaining (the default), recent or random.")
]
PositionsOption = Annotated[
    str | None,
    typer.Option("--kv-positions", help="true, or contiguous: counted over what is held, past the trained context."),
]
EvictDecodingOption = Annotated[
    bool, typer.Option("--kv-evict-decoding", help="Evict while writing, too: budget + local entries at most.")
]


def kv_budget(
    bundle: Path,
    budget: int | None,
    chunk: int | None,
    stabilizers: int | None,
    local: int | None,
    policy: str | None,
    positions: str | None,
    evict_decoding: bool,
) -> KvBudget | None:
    """What the options ask for; None without a budget, of which the others say how."""
    how = {
        "chunk": chunk,
        "stabilizers": stabilizers,
        "local": local,
        "policy": policy,
        "positions": positions,
        "evict_decoding": evict_decoding or None,
    }
    if budget is None:
        asked = [f"--kv-{key.replace('_', '-')}" for key, value in how.items() if value is not None]
        if asked:
            raise UserError(f"{', '.join(asked)} says how a KV budget is kept: give it with --kv-budget")
        return None
    from ..runtime.kv_budget import choose_budget

    return choose_budget(bundle, budget, **how)
