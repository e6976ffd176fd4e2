"""Runs a command for as long as the process that started this one lives, however that one ends.

Run as a file of its own, `python keeper.py COMMAND…`, with the standard library alone: it starts in milliseconds.
The starting process holds the other end of standard input, which the system closes even when it is killed.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading

PATIENCE = 3  # seconds the command gets to end by itself
_PR_SET_PDEATHSIG = 1


def _end_with_parent() -> None:
    """On Linux the command ends even if this process is killed. It has one thread when it starts the command."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main(command: list[str]) -> None:
    linux = sys.platform == "linux"
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_end_with_parent if linux else None)

    def follow() -> None:
        code = child.wait()
        os._exit(code if code >= 0 else 128 - code)

    threading.Thread(target=follow, daemon=True).start()
    while os.read(0, 4096):
        pass
    child.terminate()
    try:
        child.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


if __name__ == "__main__":
    main(sys.argv[1:])
