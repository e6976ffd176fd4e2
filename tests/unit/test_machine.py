"""What of the machine a process may use."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system pins no process to cores")
def test_cores_are_those_that_the_process_may_use():
    code = "import os; from compress.core.machine import cores; print(cores(), len(os.sched_getaffinity(0)))"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert found == ["1", "1"]  # as conftest.py has pinned this process


def test_elsewhere_all_cores_count(monkeypatch):
    from compress.core import machine

    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert machine.cores() == 6 and machine.threads_of(0) == 0 and machine.threads_of(3) == 3


@pytest.mark.parametrize(("held", "asked", "threads"), [(2, 0, 2), (2, 5, 5), (6, 0, 0)])
def test_runtimes_that_count_the_machines_cores_are_told_fewer(monkeypatch, held, asked, threads):
    from compress.core import machine

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(held)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert machine.threads_of(asked) == threads
