"""The bound of what trained heads can do: the labels they are trained to predict, of the answer to come."""

from __future__ import annotations

from typing import ClassVar, Literal

from ..policy import Floats, Policy, View


class Oracle(Policy):
    """What the true answer attends to most stays."""

    kind: Literal["oracle"] = "oracle"
    needs: ClassVar = frozenset({"labels"})

    def score(self, view: View) -> Floats:
        assert view.labels is not None
        return view.labels
