"""The command that serves a bundle over HTTP. It imports neither torch nor transformers."""

from __future__ import annotations

from typing import Annotated

import typer

from ..pipeline.places import check_text
from .console import errors
from .kv_options import NO_BUDGET, KvOptions
from .option_groups import with_groups
from .options import BundleArgument, ContextOption, EngineOption, ThreadsOption, TypeOption
from .place_options import DEFAULT_DEVICE_PLACE, DevicePlaceOptions


@with_groups
def serve(
    bundle: BundleArgument,
    engine: EngineOption = None,
    kind: TypeOption = None,
    depth: Annotated[
        int | None,
        typer.Option("--depth", help="Depth served when the request names no @DEPTH; the deepest if not given."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 picks a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", envvar="COMPRESS_API_KEY", help="Answer only requests that carry this key."),
    ] = None,
    context: ContextOption = 4096,
    threads: ThreadsOption = 0,
    options: KvOptions = NO_BUDGET,
    where: DevicePlaceOptions = DEFAULT_DEVICE_PLACE,
) -> None:
    """Serve a bundle over the OpenAI API; the model name NAME@18 runs 18 blocks. Ctrl-C stops it."""
    from ..core.errors import UserError
    from ..core.extras import need

    need("compress serve", "starlette", "uvicorn")
    from ..runtime.generator import check_depth
    from ..runtime.serve.server import address, is_loopback, listen
    from ..runtime.serve.server import serve as run
    from ..runtime.session import Session

    check_text(api_key, "--api-key")
    if api_key is not None and not api_key.strip():
        raise UserError("--api-key: the key is empty")
    budget, place = options.budget(bundle), where.place()
    with listen(host, port) as listening:
        try:
            how = {"threads": threads, "context": context, "kv_budget": budget, "kv_type": options.kv_type}
            with Session(bundle, engine, kind, **how, place=place) as session:
                if depth is not None:
                    check_depth(depth, session.depths)
                if not is_loopback(listening):
                    _warn(api_key)
                shown = ", ".join(map(str, session.depths))
                model = f"{session.manifest.name} ({session.engine} {session.kind} on {session.device}, depths {shown})"
                print(f"{model} at {address(listening)}; Ctrl-C ends", flush=True)
                run(session, listening, depth=depth, api_key=api_key)
        except KeyboardInterrupt:  # uvicorn raises it again once every connection is closed
            pass
        errors.print("stopped")  # also if a shell ignores SIGINT, and nothing is raised


def _warn(api_key: str | None) -> None:
    who = "anyone with the key" if api_key else "anyone, without a key (--api-key)"
    errors.print(f"warning: other machines reach this server, and {who} may use it", style="yellow")


def add_to(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog="Example: compress serve bundle --engine onnx --port 8000")(serve)
