"""The ASGI application: routes, depth by model name, errors, and clients that disconnect."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ...core.errors import UserError
from ...records.bundle import BundleManifest
from ..generator import check_depth
from ..llamacpp_server import ServerGone
from ..session import Pieces, Session, Usage
from .protocol import ChatRequest, CompletionRequest, ResponseBuilder, read_request
from .refusal import Refused, wrong
from .worker import AnswerJob, Stopping, Worker

LARGEST_BODY = 16 * 2**20  # bytes
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_log = logging.getLogger(__name__)


def make_app(
    session: Session, worker: Worker, *, depth: int | None = None, api_key: str | None = None, local: bool = True
) -> Starlette:
    """The endpoint for an open session; `depth` is served when the model's name has no @DEPTH, None: the deepest.

    With `api_key` every request must carry it. With `local` only requests to a loopback host name are answered, so that
    no web page can reach the server under a host name of its own (DNS rebinding). Raises `UserError` for a depth that
    does not exist.
    """
    endpoint = _Endpoint(session, worker, session.depths[-1] if depth is None else depth)
    routes = [
        Route("/health", endpoint.health),
        Route("/v1/models", endpoint.models),
        Route("/v1/models/{model:path}", endpoint.model),
        *_post("/v1/chat/completions", endpoint.chat),
        *_post("/v1/completions", endpoint.complete),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(_Gate, api_key=api_key, local=local)],
        exception_handlers={Refused: _refuse, HTTPException: _refuse_route, Exception: _fail},
    )


def _post(path: str, answer: Callable[..., Any]) -> list[Route]:
    """The route, with and without a trailing slash, because few clients follow a redirect of a POST."""
    return [Route(path, answer, methods=["POST"]), Route(path + "/", answer, methods=["POST"])]


class _Endpoint:
    def __init__(self, session: Session, worker: Worker, depth: int):
        check_depth(depth, session.depths)
        self._session, self._worker = session, worker
        name = session.manifest.name
        self._models = {name: depth} | {f"{name}@{each}": each for each in session.depths}
        self._created = int((session.path / BundleManifest.FILE).stat().st_mtime)

    async def health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._describe(name) for name in self._models]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["model"]
        self._depth(name)
        return JSONResponse(self._describe(name))

    async def chat(self, request: Request) -> Response:
        body = read_request(ChatRequest, await _body(request))
        settings = body.settings(self._depth(body.model), self._session.context)
        variables = await run_in_threadpool(self._variables, body)
        return await self._answer(request, body, True, self._session.chat, body.messages, settings, variables)

    async def complete(self, request: Request) -> Response:
        body = read_request(CompletionRequest, await _body(request))
        settings = body.settings(self._depth(body.model), self._session.context)
        return await self._answer(request, body, False, self._session.complete, body.prompt, settings)

    def _variables(self, body: ChatRequest) -> dict[str, Any]:
        """Variables for the chat template; `Refused` for one that the template does not use."""
        variables = body.variables()
        known = self._session.template.variables if variables else frozenset()
        for name, (value, field) in variables.items():
            if name not in known and not (
                name == "enable_thinking" and value is False
            ):  # there is nothing to leave out
                listed = ", ".join(sorted(known)) or "none"
                raise wrong(field, f"the model's chat template has no variable {name}; it has: {listed}")
        return {name: value for name, (value, _) in variables.items() if name in known}

    async def _answer(
        self, request: Request, body: ChatRequest | CompletionRequest, chat: bool, begin: Any, *arguments: Any
    ) -> Response:
        try:
            # This only builds and checks the prompt; the text is generated when the worker asks for it.
            pieces: Pieces = await run_in_threadpool(begin, *arguments)
        except UserError as error:
            code = "context_length_exceeded" if "the context has room for" in str(error) else None
            raise Refused(400, str(error), param="messages" if chat else "prompt", code=code) from error
        counted = body.stream_options.include_usage
        answer, job = ResponseBuilder(body.model, chat, counted), self._worker.submit(pieces)
        if body.stream:
            return _Stream(job, _events(job, answer, counted))
        return await _unless_gone(request, job, _whole(job, answer))

    def _depth(self, model: str) -> int:
        if model not in self._models:
            listed = ", ".join(self._models)
            raise Refused(
                404, f"model {model!r} is not served; available: {listed}", param="model", code="model_not_found"
            )
        return self._models[model]

    def _describe(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._created, "owned_by": "compress"}


async def _whole(job: AnswerJob, answer: ResponseBuilder) -> Response:
    text = ""
    try:
        async for piece in job.read():
            text += piece.text
            if piece.finish is not None:
                return JSONResponse(answer.whole(text, piece.finish, cast(Usage, piece.usage)))
    except (UserError, Stopping) as error:
        raise _as_refusal(error) from error
    raise AssertionError("an answer ended without a finish reason")


async def _events(job: AnswerJob, answer: ResponseBuilder, counted: bool) -> AsyncIterator[str]:
    """Server-sent events. The status has already been sent, so an error becomes an event."""
    if opening := answer.opening():
        yield _event(opening)
    try:
        async for piece in job.read():
            if piece.text:
                yield _event(answer.piece(piece.text))
            if piece.finish is not None:
                yield _event(answer.closing(piece.finish))
                if counted:
                    yield _event(answer.usage(cast(Usage, piece.usage)))
    except Exception as error:
        yield _event(_as_refusal(error).body())
        return
    yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    # Non-ASCII characters are escaped: some clients treat U+2028 and similar ones as line ends.
    return f"data: {json.dumps(body)}\n\n"


def _as_refusal(error: Exception) -> Refused:
    if isinstance(error, (Stopping, ServerGone)):
        return Refused(503, str(error))
    if isinstance(error, UserError):
        return Refused(500, str(error))  # the request is fine; a file of the bundle is not
    _log.error("an answer failed", exc_info=error)
    return Refused(500, "internal error; see the server's log")


class _Stream(StreamingResponse):
    """Sends events until the client disconnects."""

    def __init__(self, job: AnswerJob, events: AsyncIterator[str]):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancel()


async def _unless_gone(request: Request, job: AnswerJob, response: Any) -> Response:
    """The response; the job is cancelled if the client disconnects first."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    making, leaving = asyncio.ensure_future(response), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((making, leaving), return_when=asyncio.FIRST_COMPLETED)
        return making.result() if making.done() else Response(status_code=499)  # nobody reads it
    finally:
        job.cancel()
        making.cancel()
        leaving.cancel()


async def _body(request: Request) -> bytes:
    # Web pages may send forms, plain text and untyped bodies to any server without a CORS preflight, but not JSON.
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media_type not in ("application/json", "text/json") and not media_type.endswith("+json"):
        said = f"not {media_type}" if media_type else "but the header is missing"
        raise Refused(400, f"the body must be JSON, with the header Content-Type: application/json, {said}")
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > LARGEST_BODY:
            raise Refused(413, f"the body is larger than {LARGEST_BODY} bytes")
    return body


class _Gate:
    """Admits requests by API key and by host name."""

    def __init__(self, app: ASGIApp, api_key: str | None, local: bool):
        self._app, self._key, self._local = app, api_key, local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refused := self._check(Request(scope))):
            await JSONResponse(refused.body(), refused.status)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check(self, request: Request) -> Refused | None:
        host = request.headers.get("host", "").lower()
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if self._local and name not in _LOOPBACK:
            return Refused(403, f"this server answers requests to localhost only, not to {host or 'no host'}")
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if self._key is None or (
            scheme.lower() == "bearer"
            and hmac.compare_digest(key.strip().encode("latin-1"), self._key.encode())  # as starlette decodes headers
        ):
            return None
        return Refused(401, "the API key is missing or wrong", code="invalid_api_key")


async def _refuse(_: Request, error: Exception) -> Response:
    refused = cast(Refused, error)
    return JSONResponse(refused.body(), refused.status)


async def _refuse_route(request: Request, error: Exception) -> Response:
    exception = cast(HTTPException, error)
    advice = "" if exception.status_code != 404 or request.url.path.startswith("/v1/") else "; the API is below /v1"
    refused = Refused(exception.status_code, f"{request.method} {request.url.path}: {exception.detail}{advice}")
    return JSONResponse(refused.body(), refused.status, headers=exception.headers)


async def _fail(_: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)
    return JSONResponse(Refused(500, "internal error; see the server's log").body(), 500)
