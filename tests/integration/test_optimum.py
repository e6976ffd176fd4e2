"""Our commands under optimum-cli, through the namespace in which Optimum looks for those of other packages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from compress import __version__
from optimum.commands import optimum_cli


def asked(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of optimum-cli in this process."""
    monkeypatch.setattr(sys, "argv", ["optimum-cli", *arguments])
    with pytest.raises(SystemExit) as stopped:
        optimum_cli.main()
    out, err = capfd.readouterr()
    return int(stopped.value.code or 0), out, err


def test_the_installed_command_runs_a_recipe(tmp_path):
    command = [str(Path(sys.executable).with_name("optimum-cli")), "compress", "run", "tiny_random"]
    command += ["--runs", str(tmp_path), "--until", "prune"]
    found = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, timeout=120)
    assert (found.returncode, found.stderr) == (0, "")
    assert f"in {tmp_path}" in found.stdout.replace("\n", "") and "prune-" in found.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--help"], 0, "{export,env,compress}"),
        (["compress", "--version"], 0, f"compress {__version__}"),
        (["compress", "--help"], 0, "optimum-cli compress [OPTIONS] COMMAND"),
        (["compress", "run", "--help"], 0, "optimum-cli compress run [OPTIONS]"),
        (["compress", "validate", "tiny_random", "--set", "seed=3"], 0, "valid; stages: data, prune"),
        (["compress", "validate", "tiny_random", "--set", "prune.block=1"], 2, "did you mean 'blocks'?"),
        (["compress", "run", "tiny"], 2, "the recipe file 'tiny' does not exist"),
        (["compress", "bogus"], 2, "No such command 'bogus'"),
        (["compress", "run", "--", "--help"], 2, "the recipe file '--help' does not exist"),
    ],
)
def test_arguments_and_exit_codes_are_handed_on(capfd, monkeypatch, arguments, code, words):
    found, out, err = asked(capfd, monkeypatch, *arguments)
    assert (found, words in (out if code == 0 else err)) == (code, True), out + err


def test_without_arguments_it_helps(capfd, monkeypatch):
    code, out, err = asked(capfd, monkeypatch, "compress")
    assert code in (0, 2) and "inspect" in out + err
