"""Runs a row's Python tests against the code in an answer, in a separate process with limits.

docs/explanation/self-data.md lists what this sandbox blocks and what it does not.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

_FENCED = re.compile(r"```[ \t]*(\w*)[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
_CHILD = Path(__file__).with_name("sandbox_child.py")


def code_in(text: str) -> str:
    """The code of an answer: its longest fenced block marked as Python or without a language, else the whole answer."""
    blocks = [code for language, code in _FENCED.findall(text) if language.lower() in ("", "python", "py", "python3")]
    return max(blocks, key=len) if blocks else text


def passes(text: str, tests: str, *, timeout: float = 5.0, memory: int = 512) -> bool:
    """Whether `tests` (assertions) pass after running the code in `text`, within `timeout` seconds and `memory` MB.

    The process has only Python's standard library, an empty folder, no environment and no standard input, output or
    network. The tests pass if they run to their end; the exit code does not count.
    """
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(_CHILD), str(max(1, round(timeout))), str(memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        try:
            given = "\0".join((word, code_in(text), tests)).encode("utf-8", "replace")
            output, _ = process.communicate(given, timeout=timeout + 1)
        except subprocess.TimeoutExpired:
            return False
        finally:
            _end(process)
    return output == word.encode()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and everything it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.communicate()
