"""mergekit through its Python API: translates our section to its configuration and its errors to ours, silently."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..core.errors import UserError
from ..core.stage import Context
from ..modeling.checkpoint import quiet
from .config import START, MergeConfig, nearest
from .cost import SHARD

if TYPE_CHECKING:
    from ..modeling.types import ModelConfig


@contextmanager
def silenced() -> Iterator[None]:
    """Suppress logging and progress bars; mergekit would otherwise set up logging for the whole process."""
    root, mute = logging.getLogger(), logging.NullHandler()
    root.addHandler(mute)
    try:
        with quiet():
            yield
    finally:
        root.removeHandler(mute)


def find_method(name: str) -> Any:
    """A method from mergekit's registry; raises `UserError` with the closest name if there is none of that name."""
    with silenced():
        from mergekit.merge_methods import registered_methods

    methods = {method.spec.name: method for method in registered_methods()}
    if name not in methods:
        raise UserError(f"merge.method: mergekit has no method {name!r}{nearest(name, sorted(methods))}")
    return methods[name]


def base_of(config: MergeConfig, names: Sequence[str]) -> str | None:
    """The name of the base model: the recipe's; else, for a method that needs one, the first model if the method takes
    exactly two, or the model that the variants were trained from."""
    contract = find_method(config.method).spec.contract
    if config.base_model is not None or contract.base.value != "required":
        return config.base_model
    return names[0] if contract.max_inputs == 2 and len(names) == 2 else START


def check_method(config: MergeConfig, names: Sequence[str]) -> str | None:
    """The name of the base model; raises `UserError` if mergekit rejects the method, parameters or number of models.

    mergekit itself silently ignores unknown keys.
    """
    method, base = find_method(config.method), base_of(config, names)
    if base is not None and method.spec.contract.base.value == "ignored":
        raise UserError(
            f"merge.base_model: {config.method} takes no base model; list it under merge.models to merge it"
        )
    inputs = [*names] if base is None or base in names else [*names, base]
    try:
        method.validate_inputs(inputs, base)
    except ValueError as error:
        given = f"{', '.join(names)}, and {base} as base_model" if base else ", ".join(names)
        raise UserError(f"merge: {config.method} cannot merge {given}: {error}") from error
    known = {parameter.name: parameter for parameter in method.spec.parameters}
    for where, owner, parameters in _settings(config):
        for name, setting in parameters.items():
            if name not in known:
                hint = nearest(name, sorted(known)) if known else "; it has none"
                raise UserError(f"{where}: {config.method} has no parameter {name!r}{hint}")
            scope = known[name].scope.value
            if owner is not None and scope == "shared":
                raise UserError(f"{where}: {name} cannot be set per model; move it to merge.parameters")
            if owner is not None and owner == base and scope == "non_base":
                raise UserError(f"{where}: {config.method} takes no {name} for the base model; remove it")
            _check_type(f"{where}.{name}", known[name], setting)
    _check_present(config, method, names, base)
    return base


def _check_type(where: str, parameter: Any, setting: object) -> None:
    for value in _scalars(setting):
        try:
            parameter.validate(value)
        except ValueError as error:
            type_name = getattr(parameter.value_type, "__name__", parameter.value_type)
            raise UserError(f"{where}: {value!r} is not of type {type_name}") from error


def _check_present(config: MergeConfig, method: Any, names: Sequence[str], base: str | None) -> None:
    """Raise `UserError` if a required parameter is set neither for all models nor for each one."""
    own = {entry.model: entry.parameters for entry in config.models or []}
    for parameter in method.spec.parameters:
        if not parameter.required or parameter.name in config.parameters:
            continue
        shared = parameter.scope.value == "shared"
        lacking = [name for name in names if name != base and parameter.name not in own.get(name, {})]
        if shared or lacking:
            of = "" if shared else f" for {', '.join(lacking)}"
            example = f"parameters: {{{parameter.name}: {0.5 if parameter.name == 't' else 1.0}}}"
            raise UserError(f"merge.parameters: {config.method} needs {parameter.name}{of}, such as {example}")


def _settings(config: MergeConfig) -> Iterator[tuple[str, str | None, dict[str, Any]]]:
    yield "merge.parameters", None, config.parameters
    for number, entry in enumerate(config.models or []):
        yield f"merge.models.{number}.parameters", entry.model, entry.parameters


def _scalars(setting: Any) -> Iterator[Any]:
    if isinstance(setting, list):
        for item in setting:
            yield from _scalars(item)
    elif hasattr(setting, "value"):
        yield from _scalars(setting.value)
    else:
        yield setting


def _architecture(tensors: Collection[str]) -> Any:
    """A mergekit architecture made from the checkpoints' tensor names.

    mergekit's own architectures omit tensors they do not know, such as biases, and require tied heads.
    """
    from mergekit.architecture.auto import RE_LAYER_INDEX
    from mergekit.architecture.base import ModelArchitecture, ModuleArchitecture, ModuleDefinition, WeightInfo

    blocks: dict[int, list[Any]] = {}
    for name in sorted(tensors):
        number = RE_LAYER_INDEX.search(name)
        blocks.setdefault(int(number.group(1)) if number else -1, []).append(WeightInfo(name=name))

    class Stored(ModuleArchitecture):
        def pre_weights(self, config: ModelConfig) -> list[Any]:
            return blocks.get(-1, [])

        def layer_weights(self, index: int, config: ModelConfig) -> list[Any]:
            return blocks.get(index, [])

        def post_weights(self, config: ModelConfig) -> list[Any]:
            return []

        def num_layers(self, config: ModelConfig) -> int:
            return max(blocks) + 1

    return ModelArchitecture(
        modules={"default": ModuleDefinition(architecture=Stored())}, architectures=[], model_type=""
    )


def merge_weights(
    config: MergeConfig,
    folders: Mapping[str, Path],
    base: str | None,
    tensors: Collection[str],
    out: Path,
    context: Context,
) -> None:
    """Write only the merged weights into `out`, as safetensors.

    `folders` are the checkpoints by name, including the base model's; each has all of `tensors`. Random methods use the
    context's seed. Tensors are read, merged and written one at a time. Raises `UserError` if mergekit fails.
    """
    with silenced():
        from mergekit.common import ModelPath, ModelReference
        from mergekit.config import InputModelDefinition, MergeConfiguration
        from mergekit.graph import Executor
        from mergekit.io.tasks import LoaderCache
        from mergekit.options import MergeOptions
        from mergekit.plan import MergePlanner

        def reference(name: str) -> Any:
            # Not parsed from text, where mergekit reads @ as a revision and + as an adapter.
            return ModelReference(model=ModelPath(path=str(folders[name].resolve())))

        options = MergeOptions(device=context.device, trust_remote_code=False, out_shard_size=SHARD, quiet=True)
        try:
            settings = MergeConfiguration(
                merge_method=config.method,
                base_model=reference(base) if base else None,
                models=[
                    InputModelDefinition(model=reference(entry.model), parameters=_dumped(entry.parameters))
                    for entry in config.models or []
                ],
                parameters=_dumped(config.parameters),
                dtype=config.dtype,
                out_dtype=config.out_dtype,
            )
            LoaderCache().setup(options=options)
            shape = reference(config.models[0].model).config() if config.models else None
            plan = MergePlanner(settings, _architecture(tensors), options, shape).plan_to_disk(str(out))
            with torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(context.seed)
                executor = Executor(plan, torch.device(context.device), torch.device("cpu"))
                with context.progress.bar("merging", len(plan)) as advance:
                    for _ in executor.run(quiet=True):
                        advance()
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError) or os.strerror(errno.ENOSPC) in str(error):
                raise
            raise UserError(f"merge: mergekit's {config.method} failed: {_first_line(error)}") from error
        finally:
            LoaderCache.loaders.clear()  # it would keep the files open, by path


def _dumped(parameters: dict[str, Any]) -> dict[str, Any] | None:
    """Parameters as plain values, as mergekit expects."""
    plain = {
        name: [item.model_dump() if hasattr(item, "model_dump") else item for item in setting]
        if isinstance(setting, list)
        else setting.model_dump()
        if hasattr(setting, "model_dump")
        else setting
        for name, setting in parameters.items()
    }
    return plain or None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
