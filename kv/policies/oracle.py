"""An upper bound for retaining heads: it keeps by the labels that they are trained to predict, for the true answer."""

from __future__ import annotations

from typing import ClassVar, Literal

from ..policy import Floats, Policy, View


class Oracle(Policy):
    """Keeps what the true answer attends to most."""

    kind: Literal["oracle"] = "oracle"
    needs: ClassVar = frozenset({"labels"})

    def score(self, view: View) -> Floats:
        assert view.labels is not None
        return view.labels
