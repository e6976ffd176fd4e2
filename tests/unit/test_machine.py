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


def test_threads_spin_briefly_unless_the_user_says_otherwise(monkeypatch):
    from compress.core.machine import short_spins, spin_briefly

    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    spin_briefly()
    with short_spins():
        assert os.environ["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    with short_spins():
        assert os.environ["GOMP_SPINCOUNT"] == "1000"
    assert "GOMP_SPINCOUNT" not in os.environ
    spin_briefly()
    assert os.environ["GOMP_SPINCOUNT"] == "1000"


def test_the_command_line_says_so_before_anything_is_loaded():
    code = "import sys; from compress.cli.main import main\ntry: main(['--version'])\nexcept SystemExit: pass\n"
    code += "import os; print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    without = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=without)
    assert found.stdout.splitlines()[-1] == "1000 False"
