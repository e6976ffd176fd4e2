"""A request that is not served."""

from __future__ import annotations

from typing import Any


class Refused(Exception):
    """A request that is answered with an error of OpenAI's shape."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def wrong(param: str, why: str) -> Refused:
    """A field of the body that is not as it must be."""
    return Refused(400, f"{param}: {why}", param=param)
