"""The command-line options of the KV cache, for every command that runs a bundle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.errors import UserError

if TYPE_CHECKING:
    from ..kv.settings import KvBudget

BudgetOption = Annotated[
    int | None,
    typer.Option("--kv-budget", help="Maximum keys and values cached per block and KV head; others are evicted."),
]
ChunkOption = Annotated[
    int | None, typer.Option("--kv-chunk", help="Tokens read between evictions; default: the heads' setting, or 256.")
]
StabilizersOption = Annotated[
    int | None,
    typer.Option("--kv-stabilizers", help="Newest entries kept at each eviction; default: the heads' setting, or 64."),
]
LocalOption = Annotated[
    int | None,
    typer.Option("--kv-local", help="Last prompt tokens, never evicted; default: the heads' setting, or 100."),
]
PolicyOption = Annotated[
    str | None, typer.Option("--kv-policy", help="How entries are selected: retaining (default), recent or random.")
]
PositionsOption = Annotated[
    str | None,
    typer.Option(
        "--kv-positions", help="true, or contiguous: numbered within the cache, for prompts past the trained context."
    ),
]
EvictDecodingOption = Annotated[
    bool, typer.Option("--kv-evict-decoding", help="Also evict while generating, to at most budget + local entries.")
]
KvTypeOption = Annotated[
    str | None,
    typer.Option("--kv-type", help="llama.cpp: f16 (default), or q8_0: keys and values in about half the memory."),
]


@dataclass(frozen=True)
class KvOptions:
    """The values of these options, a field for each."""

    kv: BudgetOption = None
    kv_chunk: ChunkOption = None
    kv_stabilizers: StabilizersOption = None
    kv_local: LocalOption = None
    kv_policy: PolicyOption = None
    kv_positions: PositionsOption = None
    kv_evict_decoding: EvictDecodingOption = False
    kv_type: KvTypeOption = None

    def budget(self, bundle: Path) -> KvBudget | None:
        """The KV budget they describe; None without --kv-budget. `UserError` for the budget's other options without
        it."""
        how = {
            "chunk": self.kv_chunk,
            "stabilizers": self.kv_stabilizers,
            "local": self.kv_local,
            "policy": self.kv_policy,
            "positions": self.kv_positions,
            "evict_decoding": self.kv_evict_decoding or None,
        }
        if self.kv is None:
            asked = [f"--kv-{key.replace('_', '-')}" for key, value in how.items() if value is not None]
            if asked:
                verb = "has" if len(asked) == 1 else "have"
                raise UserError(f"{', '.join(asked)} {verb} no effect without --kv-budget; add --kv-budget N")
            return None
        from ..kv.settings import choose_budget

        return choose_budget(bundle, self.kv, **how)


NO_BUDGET = KvOptions()
