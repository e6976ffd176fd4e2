"""The commands that run a bundle: generate, chat, bench. They import neither torch nor transformers."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.errors import UserError
from ..core.extras import need
from ..core.files import why_not_utf8
from ..core.place import Place
from ..core.units import kilobytes, megabytes, number, percent
from ..pipeline.places import check_text, decode, read_standard_input
from .console import console, errors, figures_table, print_json
from .kv_options import NO_BUDGET, KvOptions
from .option_groups import with_groups
from .options import (
    BundleArgument,
    ContextOption,
    DepthOption,
    DraftTokensOption,
    EngineOption,
    JsonOption,
    LatencyOption,
    MaxTokensOption,
    MemoryOption,
    SeedOption,
    SystemOption,
    TemperatureOption,
    ThreadsOption,
    TopPOption,
    TypeOption,
)
from .place_options import DEFAULT_DEVICE_PLACE, DevicePlaceOptions

if TYPE_CHECKING:
    from ..api import BenchReport
    from ..kv.settings import KvBudget
    from ..runtime.session import Session, Settings, Usage


@with_groups
def generate(
    bundle: BundleArgument,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The prompt; - reads it from standard input.")],
    depth: DepthOption = None,
    engine: EngineOption = None,
    kind: TypeOption = None,
    max_tokens: MaxTokensOption = 256,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    latency_ms: LatencyOption = None,
    memory_mb: MemoryOption = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without a chat template.")] = False,
    system: SystemOption = None,
    draft_depth: Annotated[
        int | None, typer.Option("--draft-depth", help="Depth that drafts tokens for --depth to verify.")
    ] = None,
    draft: Annotated[Path | None, typer.Option("--draft", help="Bundle that drafts tokens; same tokenizer.")] = None,
    draft_tokens: DraftTokensOption = 4,
    early_exit: Annotated[
        str | None,
        typer.Option(
            "--early-exit",
            metavar="P",
            help="Exit at the first depth whose top probability exceeds this: 0.9, or 12=0.95,18=0.9.",
        ),
    ] = None,
    context: ContextOption = 4096,
    threads: ThreadsOption = 0,
    options: KvOptions = NO_BUDGET,
    where: DevicePlaceOptions = DEFAULT_DEVICE_PLACE,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing on standard error.")] = False,
) -> None:
    """Answer a prompt with a bundle, streamed, at any of its depths, in ONNX Runtime or llama.cpp."""
    from ..runtime.session import Session, Settings

    check_text(system, "--system")
    check_text(prompt, "--prompt")
    text = read_standard_input() if prompt == "-" else prompt
    budget, place = options.budget(bundle), where.place()
    tokens = len(text) // 3 + max_tokens
    fixed, deepest = _depth(
        bundle, depth, engine, kind, latency_ms, memory_mb, tokens, threads, budget, options.kv_type, place
    )
    how = {"threads": threads, "context": context, "deepest": deepest, "draft": draft}
    how |= {"kv_budget": budget, "kv_type": options.kv_type, "place": place}
    with Session(bundle, engine, kind, **how) as session:
        settings = Settings(
            max_tokens=max_tokens,
            depth=fixed,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            draft_depth=draft_depth,
            draft_tokens=draft_tokens,
            exits=_exits(early_exit, session),
        )
        messages = [{"role": "system", "content": system}] if system else []
        started = time.perf_counter()
        answer = (
            session.complete(text, settings)
            if raw
            else session.chat([*messages, {"role": "user", "content": text}], settings)
        )
        usage = None
        try:
            for piece in answer:
                print(piece.text, end="", flush=True)
                usage = piece.usage
        except KeyboardInterrupt:
            print()
            raise typer.Exit(130) from None
        print()
        if usage is not None and not quiet:
            errors.print(_summary(session, usage, time.perf_counter() - started), style="dim")


@with_groups
def chat(
    bundle: BundleArgument,
    depth: DepthOption = None,
    engine: EngineOption = None,
    kind: TypeOption = None,
    max_tokens: MaxTokensOption = 512,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    latency_ms: LatencyOption = None,
    memory_mb: MemoryOption = None,
    system: SystemOption = None,
    context: ContextOption = 4096,
    threads: ThreadsOption = 0,
    options: KvOptions = NO_BUDGET,
    where: DevicePlaceOptions = DEFAULT_DEVICE_PLACE,
) -> None:
    """Chat with a bundle. The conversation stays in its cache; /depth N switches depth, /exit ends."""
    from dataclasses import replace

    from ..runtime.session import Session, Settings

    check_text(system, "--system")
    budget, place = options.budget(bundle), where.place()
    fixed, deepest = _depth(
        bundle, depth, engine, kind, latency_ms, memory_mb, 2 * max_tokens, threads, budget, options.kv_type, place
    )
    settings = Settings(max_tokens=max_tokens, depth=fixed, temperature=temperature, top_p=top_p, seed=seed)
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    how = {"threads": threads, "context": context, "deepest": deepest}
    how |= {"kv_budget": budget, "kv_type": options.kv_type, "place": place}
    with Session(bundle, engine, kind, **how) as session:
        shown = ", ".join(map(str, session.depths))
        errors.print(
            f"{session.manifest.name}, {session.engine} {session.kind} on {session.device}, depths {shown}", style="dim"
        )
        errors.print("/depth N switches depth, /reset clears the conversation, /exit or Ctrl-D ends", style="dim")
        while (line := _read_line()) is not None:
            if line == "/reset":
                messages = list(start)
            elif line.startswith("/depth"):
                number = line.removeprefix("/depth").strip()
                if number.isdecimal() and int(number) in session.depths:
                    settings = replace(settings, depth=int(number))
                else:
                    errors.print(f"/depth {number}: give one of the bundle's depths: {shown}", style="red")
            elif line:
                messages.append({"role": "user", "content": line})
                _answer(session, messages, settings)


def _answer(session: Session, messages: list[dict[str, str]], settings: Settings) -> None:
    """Write an answer and add it to the conversation; Ctrl-C ends it early, an error takes the question back."""
    said = ""
    try:
        for piece in session.chat(messages, settings):
            print(piece.text, end="", flush=True)
            said += piece.text
    except KeyboardInterrupt:
        pass
    except UserError as error:
        errors.print(f"error: {error}", style="red")
        messages.pop()
        return
    print()
    messages.append({"role": "assistant", "content": said})


def _read_line() -> str | None:
    """The next line, None when the conversation is over. `UserError` for one that is not UTF-8 and was not typed."""
    try:
        line = _typed_line() if sys.stdin.isatty() else _piped_line()
    except (EOFError, KeyboardInterrupt):
        errors.print("")
        return None
    return None if line in ("/exit", "/quit") else line


def _typed_line() -> str:
    while True:
        try:
            return input("> ").strip()
        except UnicodeDecodeError as error:
            errors.print(f"error: the line is not UTF-8 text: {why_not_utf8(error.object, error)}", style="red")


def _piped_line() -> str:
    line = sys.stdin.buffer.readline()
    if not line:
        raise EOFError
    return decode(line, "a line of standard input").strip()


@with_groups
def bench(
    bundle: BundleArgument,
    engine: EngineOption = None,
    kind: TypeOption = None,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", help="Prompt length in tokens.")] = 128,
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="Number of tokens to decode.")] = 64,
    repeat: Annotated[int, typer.Option(help="Number of runs; the best one counts.")] = 2,
    speculate: Annotated[
        bool, typer.Option("--speculate", help="Also measure each shallower depth as a draft for the deepest.")
    ] = False,
    draft_tokens: DraftTokensOption = 4,
    threads: ThreadsOption = 0,
    options: KvOptions = NO_BUDGET,
    where: DevicePlaceOptions = DEFAULT_DEVICE_PLACE,
    as_json: JsonOption = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Also write the results, as a page (.html) or as JSON (.json).")
    ] = None,
) -> None:
    """Measure every depth in every engine: prefill, decoding, time to first token, memory; each in its own process."""
    from .. import api
    from ..pipeline.benchmark import check_bench_file, keep_in_run, write_bench
    from ..pipeline.progress import CallbackProgress

    if out is not None:
        check_bench_file(out)
        if out.suffix == ".html":
            need("compress bench --out with a page", "matplotlib")
    with errors.status("measuring") as status:
        report = api.bench(
            bundle,
            engine=engine,
            type=kind,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            repeat=repeat,
            speculate=speculate,
            draft_tokens=draft_tokens,
            threads=threads,
            kv_budget=options.budget(bundle),
            kv_type=options.kv_type,
            place=where.place(),
            on_progress=CallbackProgress(lambda event: status.update(event.note)),
        )
    if as_json:
        print_json(report)
    else:
        _show_bench(report)
    if out is not None:
        write_bench(report, out)
        errors.print(str(out))
    for file in keep_in_run(report, bundle, lambda text: errors.print(f"note: {text}", style="yellow")):
        errors.print(str(file))


def _show_bench(report: BenchReport) -> None:
    speed = ("prefill\ntokens/s", "first\ntoken", "decode\ntokens/s")
    figures = ("depth", "perplexity", *speed, "peak\nmemory", "KV per\ntoken")
    table = figures_table(f"{report.name}: every depth", ("engine", "type", "device"), figures)
    for depth in report.depths:
        table.add_row(
            depth.engine,
            depth.type,
            depth.device,
            str(depth.depth),
            number(depth.perplexity),
            number(depth.prefill_tokens_per_second),
            f"{1000 * depth.first_token_seconds:.0f} ms",
            number(depth.decode_tokens_per_second),
            megabytes(depth.peak_memory_bytes),
            kilobytes(depth.kv_bytes_per_token),
        )
    console.print(table)
    if not report.drafts:
        return
    figures = ("depth", "draft", "draft\ntokens", "accepted", "tokens/s\nalone", "tokens/s\ndrafted", "same text")
    table = figures_table("drafting with a shallower depth", ("engine", "type"), figures)
    for draft in report.drafts:
        table.add_row(
            draft.engine,
            draft.type,
            *map(str, (draft.depth, draft.draft_depth, draft.draft_tokens)),
            percent(draft.acceptance),
            number(draft.plain_tokens_per_second),
            number(draft.draft_tokens_per_second),
            "yes" if draft.equal else "no",
        )
    console.print(table)


def _depth(
    bundle: Path,
    depth: str | None,
    engine: str | None,
    kind: str | None,
    latency_ms: float | None,
    memory_mb: float | None,
    tokens: int,
    threads: int,
    kv: KvBudget | None,
    kv_type: str | None,
    place: Place,
) -> tuple[int | None, int | None]:
    """(the depth to run, the greatest to load); with auto, measured for a text of about `tokens`."""
    limited = latency_ms is not None or memory_mb is not None
    if depth != "auto":
        if limited:
            raise UserError("--latency-ms and --memory-mb have no effect without --depth auto; add --depth auto")
        if depth is None:
            return None, None
        if not depth.isdecimal():
            raise UserError(f"--depth {depth}: must be a number or auto")
        return int(depth), None
    from ..runtime.bench import choose_depth

    prompt = max(min(tokens, 512), 16)
    with errors.status("measuring depths"):
        memory = None if memory_mb is None else int(memory_mb * 1e6)
        choice = choose_depth(
            bundle,
            engine,
            kind,
            latency_ms=latency_ms,
            memory_bytes=memory,
            prompt_tokens=prompt,
            new_tokens=24,
            repeat=2,
            threads=threads,
            kv=kv,
            kv_type=kv_type,
            place=place,
        )
    errors.print(
        f"depth {choice.depth}: {choice.latency_ms:.1f} ms per token, {choice.peak_memory_bytes / 1e6:.0f} MB",
        style="dim",
    )
    return choice.depth, choice.depth


def _exits(text: str | None, session: Session) -> dict[int, float]:
    if text is None:
        return {}
    try:
        if "=" not in text:
            return {depth: float(text) for depth in session.depths[:-1]}
        return {int(depth): float(p) for depth, p in (part.split("=") for part in text.split(","))}
    except ValueError as error:
        raise UserError(f"--early-exit {text}: must be a probability, or DEPTH=PROBABILITY,…") from error


def _summary(session: Session, usage: Usage, seconds: float) -> str:
    parts = [
        f"{usage.prompt_tokens} + {usage.completion_tokens} tokens in {seconds:.1f} s",
        f"{session.engine} {session.kind} on {session.device}",
        "depth "
        + ", ".join(
            f"{depth}: {count}" if len(usage.depths) > 1 else str(depth) for depth, count in usage.depths.items()
        ),
    ]
    if session.kv is not None:
        parts.append(f"{session.kv.budget} keys and values per head ({session.kv.policy})")
    if usage.drafted:
        parts.append(f"{usage.accepted} of {usage.drafted} drafted tokens accepted")
    return "; ".join(parts)


def add_to(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(epilog='Example: compress generate bundle --depth 18 --prompt "Why is the sky blue?"')(generate)
    app.command(epilog="Example: compress chat bundle --engine onnx --depth auto --latency-ms 20")(chat)
    app.command(epilog="Example: compress bench bundle --speculate --out bench.html")(bench)
