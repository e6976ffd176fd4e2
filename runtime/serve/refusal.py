"""Rejected requests."""

from __future__ import annotations

from typing import Any


class Refused(Exception):
    """A rejected request; the response has the form of OpenAI's errors."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        error_type = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": error_type, "param": self.param, "code": self.code}}


def wrong(param: str, why: str) -> Refused:
    """A refusal of an invalid field of the body."""
    return Refused(400, f"{param}: {why}", param=param)
