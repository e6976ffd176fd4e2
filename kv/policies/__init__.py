"""Eviction policies, one per file; the file's name is the policy's name.

A policy works in every runtime that provides what it needs (`kv.policy`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...core.registry import Registry
from ..policy import Policy

if TYPE_CHECKING:
    from ..settings import KvBudget

POLICIES = Registry(__name__, Policy, "compress.policies", "KV policy", ("retaining", "recent", "random"))


def policy(name: str) -> type[Policy]:
    """The policy of this name. `UserError` if there is none."""
    return POLICIES.get(name)


def make(settings: KvBudget, seed: int = 0) -> Policy:
    """The policy that a cache's settings name."""
    return policy(settings.policy).of(settings, seed)
