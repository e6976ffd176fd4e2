"""Script that `sandbox.py` runs, with only the standard library: sets limits, runs the code, then its tests.

Arguments: seconds, megabytes. Standard input: a secret word, the code and the tests, separated by NUL. The word is
written to standard output once the tests have run to their end.
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable
from typing import Any

_NETWORK = 0x40000000 | 0x10000000  # CLONE_NEWNET | CLONE_NEWUSER
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_REFUSED = (
    "socket. subprocess. ctypes. os.exec os.fork os.posix_spawn os.spawn os.system os.startfile os.kill os.putenv "
    "os.remove os.rename os.rmdir os.mkdir os.link os.symlink os.truncate os.chmod os.chown os.utime os.setxattr "
    "os.removexattr shutil. pty. mmap. resource. signal.pthread_kill"
).split()


def _main() -> None:
    seconds, megabytes = int(sys.argv[1]), int(sys.argv[2])
    word, code, tests = sys.stdin.buffer.read().decode("utf-8").split("\0", 2)
    output = os.dup(1)
    quiet = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(quiet, stream)
    _leave_the_network()
    _limit(seconds, megabytes)
    sys.argv = ["answer"]
    module = types.ModuleType("answer")  # not __main__: code of an answer may end the process there
    sys.modules["answer"] = module
    run = _runner()
    sys.addaudithook(_hook())
    run(code, module)
    run(tests, module)
    os.write(output, word.encode())
    os._exit(0)  # do not wait for threads that the code left running


def _leave_the_network() -> None:
    """Move to a new network namespace without interfaces, where Linux allows that without privileges."""
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    ctypes.CDLL(None, use_errno=True).unshare(_NETWORK)


def _limit(seconds: int, megabytes: int) -> None:
    try:
        import resource
    except ImportError:  # Windows: the parent's timeout is the limit
        return
    limits = {
        "RLIMIT_CPU": seconds,
        "RLIMIT_AS": megabytes << 20,
        "RLIMIT_FSIZE": 0,
        "RLIMIT_NPROC": 0,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
    }
    for name, value in limits.items():
        limit = getattr(resource, name, None)
        if limit is not None:
            hard = resource.getrlimit(limit)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            try:
                resource.setrlimit(limit, (value, value))
            except (ValueError, OSError):  # macOS refuses some; the others hold
                continue


def _hook() -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that makes the interpreter refuse network access, new processes, and all changes to files."""
    refused, writing = tuple(_REFUSED), _WRITING

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(refused):
            raise PermissionError(f"{event} is not allowed here")
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & writing:
            raise PermissionError("writing files is not allowed here")

    return refuse


def _runner() -> Callable[[str, types.ModuleType], None]:
    """Runs source text in a module, as an import would."""
    from importlib.abc import InspectLoader

    class Source(InspectLoader):
        def __init__(self, text: str):
            self.text = text

        def get_source(self, fullname: str) -> str:
            return self.text

    return lambda text, module: Source(text).exec_module(module)


if __name__ == "__main__":
    _main()
