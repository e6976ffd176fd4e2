"""The functions of `compress.api` that merge, export and evaluate checkpoints without a recipe.

`**keys` are those of the recipe's section of the same name, checked with the same messages.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from ruamel.yaml.comments import CommentedMap

from ..core.errors import UserError
from ..core.extras import FULL, need
from ..core.files import check_folder_exists
from ..core.place import ANYWHERE, Place
from ..core.stage import Context
from ..evaluation.config import EvaluateConfig
from ..export.config import ExportConfig
from ..merge.config import MergeConfig
from ..records.bundle import BundleManifest
from ..records.models import ModelEntry
from ..runtime.bundle import is_bundle, read_bundle
from .explain import readable_errors
from .models import ModelLike, cache_of, check_dtype, check_sources
from .options import checked
from .overrides import apply_override
from .places import bundle_name, check_file, check_name, check_new
from .progress import OnProgress, as_progress
from .steps import RowsLike, rows_folder

EVEN = {"t": 0.5, "weight": 1.0}  # defaults for parameters that a method requires


def merge(
    models: Sequence[ModelLike],
    out: str | Path,
    *,
    method: str = "slerp",
    base: ModelLike | None = None,
    set: Sequence[str] = (),
    seed: int = 0,
    device: str = "cpu",
    runs: str | Path = "runs",
    on_progress: OnProgress = None,
) -> Path:
    """Merge checkpoints of the same shape and vocabulary with a method of mergekit into the checkpoint folder `out`.

    >>> merge([first.model, second.model], "merged", method="slerp", set=["parameters.t=0.3"])

    `base` is the model they come from, for methods that need one; `set` are overrides of the recipe's `merge` section.
    Required parameters that `set` lacks weight all models equally: t is 0.5, every weight 1. `seed` is for methods that
    sample. Raises `UserError` with the first difference that keeps two checkpoints from being merged.
    """
    need("compress merge", *FULL)
    out, cache = Path(out), cache_of(runs)
    names = [str(model) for model in models]
    check_new(out)
    check_sources([*names, *([str(base)] if base is not None else [])], cache)
    from ..merge.bridge import find_method
    from ..merge.stage import merge_checkpoints
    from ..modeling.load import resolve

    asked = {parameter.name for parameter in find_method(method).spec.parameters if parameter.required}
    even = {name: value for name, value in EVEN.items() if name in asked}
    entries = [CommentedMap(model=name, parameters=CommentedMap()) for name in names]
    base_model = None if base is None else str(base)
    tree = CommentedMap(method=method, base_model=base_model, models=entries, parameters=CommentedMap(even))
    for override in set:
        apply_override(tree, override, {})
    config = checked(MergeConfig, tree)
    sources = [entry.model for entry in config.models or []] + ([config.base_model] if config.base_model else [])
    check_sources(sources, cache)
    context = Context(seed=seed, device=device, progress=as_progress(on_progress))
    folders = {name: resolve(name, cache, progress=context.progress) for name in sources}
    with readable_errors(f"merge, writing to {out}"):
        out.parent.mkdir(parents=True, exist_ok=True)
        merge_checkpoints(config, folders, out, context)
    return out


def export(
    model: ModelLike,
    out: str | Path,
    *,
    name: str | None = None,
    rows: RowsLike | None = None,
    runs: str | Path = "runs",
    place: Place = ANYWHERE,
    on_progress: OnProgress = None,
    **keys: object,
) -> BundleManifest:
    """Export a checkpoint into the new bundle `out`; every artifact is compared with it in its stock runtime.

    >>> export(recovered.model, "bundle", gguf=["Q4_K_M"], onnx=["int4"], rows=rows).artifacts[0].verification.kl

    `keys` are those of the recipe's `export` section: gguf, onnx, depths, verify … With `rows` an importance matrix
    weights rounding errors, and `train_scales={}` trains on them. `name` names the artifacts (default: the checkpoint's
    name); they are verified at `place`. Returns the bundle's manifest: sizes in bytes, bits per weight, perplexity and
    KL (nats per token) of every artifact.

    Raises `UserError` for models that a format cannot represent, and for an artifact past its type's tolerance.
    """
    need("compress export", *FULL)
    place.opens_files("compress export")
    config = checked(ExportConfig, keys)
    out, cache = Path(out), cache_of(runs)
    if name is not None:
        check_name(name)
    check_new(out)
    (source,) = check_sources([str(model)], cache)
    data = rows_folder(rows)
    from ..export.stage import export_checkpoint
    from ..modeling.load import resolve

    progress = as_progress(on_progress)
    folder = resolve(str(model), cache, progress=progress)
    with readable_errors(f"export, writing to {out}"):
        context = Context(progress=progress, place=place)
        export_checkpoint(folder, out, config, context, name or bundle_name(source.name), data)
    return read_bundle(out)


def extract(bundle: str | Path, out: str | Path, *, type: str, depth: int | None = None) -> str:
    """Write one depth of a bundle's `type` as a standalone .gguf file or ONNX folder; all blocks without `depth`.

    Returns a note on where the bundle's retaining heads are, or "" if it has none. Raises `UserError` for a type or
    depth that the bundle lacks.
    """
    bundle, out = Path(bundle), Path(out)
    check_new(out)
    from ..export.extract import extract as write

    manifest = read_bundle(bundle, hashes=True)  # so that what is copied is what was verified
    with readable_errors(f"extract, writing to {out}"):
        artifact = write(bundle, type, depth, out)
    retaining = manifest.retaining
    if retaining is None:
        return ""
    if artifact.format == "gguf":
        return f"the retaining heads are in a file of their own, {bundle / retaining.gguf}"
    return "it includes the retaining heads' scores"


def evaluate(
    model: ModelLike,
    *,
    base: ModelLike | None = None,
    text: str | Path | None = None,
    rows: RowsLike | None = None,
    tasks: Sequence[str | Path] = (),
    device: str = "cpu",
    dtype: str = "float32",
    runs: str | Path = "runs",
    place: Place = ANYWHERE,
    on_progress: OnProgress = None,
    **keys: object,
) -> list[ModelEntry]:
    """Measure a checkpoint at each of its depths, or every artifact of a bundle; the `base`, if given, comes first.
    Behind each artifact of a cut model comes its rival, the base quantized to at most its bytes (`rival=False`: not).

    >>> evaluate("bundle", base=model, text="wiki.txt", tasks=["builtin:copy"], limit=50)[1].perplexity

    Perplexity and, with a `base`, KL(base ‖ model) in nats per token and top-1 agreement are measured on the file
    `text`, or on the held-out `rows`. `tasks` are JSONL files, builtin:copy, builtin:addition and names of lm-eval
    tasks. `keys` are those of the recipe's `evaluate` section: tokens, window, limit, retrieval … `device` is
    torch's; artifacts run at `place`.

    Raises `UserError` if there is nothing to measure on, and for a task that cannot be read.
    """
    need("compress eval", *FULL)
    place.opens_files("compress eval")
    check_dtype(dtype)
    paths = [str(task) for task in tasks]
    values = {**keys, "text": _here(text), "tasks": [_here(t) if t.endswith(".jsonl") else t for t in paths]}
    config = checked(EvaluateConfig, values)
    if text is None and rows is None:
        raise UserError("name a text file to measure perplexity on: --text FILE")
    path, cache = Path(str(model)), cache_of(runs)
    bundle = is_bundle(path)
    _check_files(config, text)
    if config.rival and not bundle:
        raise UserError(f"--rival: rivals stand beside the exported files of a bundle, and {path} is not a bundle")
    if config.rival and base is None:
        raise UserError("--rival: a rival is the unpruned model at a file's size; name the model with --base")
    check_sources([*([] if bundle else [str(model)]), *([] if base is None else [str(base)])], cache)
    data = rows_folder(rows)
    if bundle:
        read_bundle(path, hashes=True)  # so that what is measured is what was verified
    from ..evaluation.stage import check, evaluate_path
    from ..modeling.load import resolve

    context = Context(device=device, dtype=dtype, progress=as_progress(on_progress), place=place)
    folder = path if bundle else resolve(str(model), cache, progress=context.progress)
    reference = None if base is None else resolve(str(base), cache, progress=context.progress)
    check(config, folder, context)
    with tempfile.TemporaryDirectory(prefix="compress-eval-") as work:
        return evaluate_path(folder, config, context, reference, Path(work), data)


def values_of(overrides: Sequence[str], option: str) -> Mapping[str, object]:
    """The values of KEY=VALUE texts that were given with `option`, for a section's keys."""
    tree = CommentedMap()
    for override in overrides:
        apply_override(tree, override, {}, option)
    return dict(tree)


def _here(path: str | Path | None) -> str | None:
    return None if path is None else str(Path(path).resolve())


def _check_files(config: EvaluateConfig, text: str | Path | None) -> None:
    """Reject unreadable texts and tasks before any model is read."""
    if text is not None:
        check_file(Path(text), "--text")
    for task in config.tasks:
        if task.endswith(".jsonl"):
            check_file(Path(task), "--task")
    if config.harness.folder is not None:
        check_folder_exists(Path(config.harness.folder), "--task-folder: ")
    if config.retrieval is not None and config.retrieval.text is not None:
        check_file(Path(config.retrieval.text), "--retrieval text")
