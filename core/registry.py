"""Methods found by name: one class in one file of a folder, and those that installed packages add.

A method is a class derived from the base class of its folder (an objective, a metric, a heal, a search, a check). Its
fields are its options in the recipe, `kind` is its name there, and the file that holds it has that name too:

    class Focal(Objective):                       # training/objectives/focal.py
        kind: Literal["focal"] = "focal"
        gamma: float = 2.0

Another package adds one with an entry point of that name in the folder's group:

    [project.entry-points."compress.objectives"]
    focal = "my_package.focal:Focal"

Methods are imported when a recipe is checked, so their files must not import torch at the top.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from functools import cache, cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any, Generic, TypeVar, Union, get_args

from pydantic import BaseModel, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from .errors import UserError
from .stage import Section
from .suggest import did_you_mean


class Method(Section):
    """Base of the folders' base classes: a named method with its options as fields."""

    kind: str  # each method narrows it to its own name: Literal["asft"] = "asft"


M = TypeVar("M", bound=Method)
UNUSABLE = "unusable_method"  # pydantic's error type for a method that exists but cannot be used
_PACKAGES: dict[type, tuple[str, str]] = {}  # method → the package that added it, and its version
_installed = cache(entry_points)  # of all groups; cached, because reading them takes a tenth of a second


def named(value: object) -> Any:
    """`objective: asft` is short for `objective: {kind: asft}`."""
    return {"kind": value} if isinstance(value, str) else value


class Registry(Generic[M]):
    """The methods in a package's folder and in the entry points of a group.

    `base` is the class they derive from, `noun` the word for one in messages. Lists begin with the names in `first`, in
    that order; the others follow alphabetically.
    """

    def __init__(self, package: str, base: type[M], group: str, noun: str, first: Sequence[str] = ()):
        self._package, self._base, self._group, self._noun, self._first = package, base, group, noun, first
        self.unusable: dict[str, str] = {}  # name → reason; complete once `methods` was read

    @property
    def names(self) -> list[str]:
        """The names a recipe may give."""
        return list(self.methods)

    @cached_property
    def methods(self) -> dict[str, type[M]]:
        """Every method by its name."""
        methods: dict[str, type[M]] = {}
        for module in pkgutil.iter_modules(importlib.import_module(self._package).__path__):
            methods[module.name] = self._of_module(f"{self._package}.{module.name}", module.name)
        points = _installed().select(group=self._group)
        for point in sorted(points, key=lambda point: (point.name, *_origin(point))):
            if point.name in methods or point.name in self.unusable:
                other = " ".join(_PACKAGES.get(methods.pop(point.name, Method), ("compress",)))
                self.unusable[point.name] = (
                    f"the {self._noun} {point.name!r} is in two packages, {other} and {' '.join(_origin(point))}; "
                    "uninstall one of them"
                )
            elif (method := self._of_entry_point(point)) is not None:
                methods[point.name] = method
        order = {name: number for number, name in enumerate(self._first)}
        return dict(sorted(methods.items(), key=lambda item: (order.get(item[0], len(order)), item[0])))

    def get(self, name: str) -> type[M]:
        """The method of that name. Raises `UserError` if there is none, or it cannot be used."""
        if name in self.methods:
            return self.methods[name]
        if name in self.unusable:
            raise UserError(self.unusable[name])
        meant = did_you_mean(name, self.names) or "."
        raise UserError(f"unknown {self._noun} {name!r}{meant} Known: {', '.join(self.names)}")

    def union(self) -> Any:
        """The type of a recipe's key that takes one of the methods: a name, or a mapping with `kind` and options."""

        def usable(value: object) -> Any:
            value = named(value)
            kind = value.get("kind") if isinstance(value, dict) else None
            if isinstance(kind, str) and kind in self.unusable:
                raise PydanticCustomError(UNUSABLE, "{why}", {"why": self.unusable[kind]})
            return value

        kinds = tuple(self.methods.values())
        return Annotated[Union[kinds], Field(discriminator="kind"), BeforeValidator(usable)]  # noqa: UP007

    def listed(self) -> str:
        """The names as part of a sentence: sft, dft or kd."""
        return " or ".join(part for part in (", ".join(self.names[:-1]), self.names[-1]) if part)

    def _of_module(self, module: str, name: str) -> type[M]:
        for value in vars(importlib.import_module(module)).values():
            if self._is_method(value, name):
                return value
        raise TypeError(f"{module} has no {self._base.__name__} whose kind is {name!r}")

    def _of_entry_point(self, point: EntryPoint) -> type[M] | None:
        """The class that an entry point names; None, with the reason noted, if its package is broken."""
        try:
            method: Any = point.load()
            if not self._is_method(method, point.name):
                raise TypeError(f"{point.value} is no {self._base.__name__} whose kind is {point.name!r}")
            method.model_rebuild()
        except (Exception, SystemExit) as error:  # importing a foreign module can raise anything
            why = f"{type(error).__name__}: {' '.join(str(error).split())}"
            package = " ".join(_origin(point))
            self.unusable[point.name] = f"the {self._noun} {point.name!r} of the package {package} is broken: {why}"
            return None
        _PACKAGES[method] = _origin(point)
        return method

    def _is_method(self, value: object, name: str) -> bool:
        if not (isinstance(value, type) and issubclass(value, self._base)):
            return False
        field = value.model_fields["kind"]
        return get_args(field.annotation) == (name,) and field.default == name


def packages(value: object) -> dict[str, str]:
    """The packages, with versions, whose methods a section of a recipe uses."""
    versions: dict[str, str] = {}
    if isinstance(value, BaseModel):
        used = [type(value), *(value.methods() if isinstance(value, Section) else [])]
        versions |= dict(_PACKAGES[method] for method in used if method in _PACKAGES)
        value = [getattr(value, name) for name in type(value).model_fields]
    elif isinstance(value, dict):
        value = list(value.values())
    for part in value if isinstance(value, (list, tuple)) else ():
        versions |= packages(part)
    return versions


def _origin(point: EntryPoint) -> tuple[str, str]:
    """Name and version of an entry point's package."""
    return (point.dist.name, point.dist.version) if point.dist is not None else (point.module, "")
