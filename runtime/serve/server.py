"""Runs the application: the listening socket, uvicorn, and an orderly shutdown."""

from __future__ import annotations

import errno
import socket
from ipaddress import ip_address

import uvicorn

from ...core.errors import UserError
from ..session import Session
from .app import make_app
from .worker import Worker

_PATIENCE = 3  # seconds that clients get to read the rest of an answer at shutdown


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. `UserError` if the port is taken or not allowed, or the host is not this machine."""
    if not 0 <= port <= 65535:
        raise UserError(f"--port {port}: must be between 0 and 65535")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except UnicodeError as error:
        raise UserError(f"--host {host}: not a valid host name: {error}") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"port {port} on {host} is in use: stop the process listening there, or choose another --port"
            ) from error
        raise UserError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error


def address(listening: socket.socket) -> str:
    """http://HOST:PORT/v1."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def is_loopback(listening: socket.socket) -> bool:
    """Whether only this machine can reach it."""
    return ip_address(listening.getsockname()[0]).is_loopback


class _Server(uvicorn.Server):
    """Cancels unfinished answers at shutdown instead of waiting for them."""

    def __init__(self, config: uvicorn.Config, worker: Worker):
        super().__init__(config)
        self._worker = worker

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._worker.stop()
        await super().shutdown(sockets)


def serve(session: Session, listening: socket.socket, *, depth: int | None = None, api_key: str | None = None) -> None:
    """Answer requests until SIGINT or SIGTERM; the signal is raised again after the shutdown."""
    worker = Worker()
    try:
        app = make_app(session, worker, depth=depth, api_key=api_key, local=is_loopback(listening))
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=_PATIENCE
        )
        _Server(config, worker).run([listening])
    finally:
        worker.join()
