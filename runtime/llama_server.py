"""The user's own llama-server over HTTP: started here, or already running."""

from __future__ import annotations

import http.client
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import psutil

from ..core.errors import UserError
from ..core.gguf_header import read_header, read_tensors, split_files
from ..core.machine import short_spins
from ..core.place import Place
from ..records.bundle import ArtifactEntry, BundleManifest
from .artifact_types import GGUF_CACHE
from .llamacpp_server import ServerGone

KEY = "LLAMA_API_KEY"  # llama.cpp's own variable
ANSWER_SECONDS = 900  # the longest wait for an answer: reading a long prompt on a slow machine takes minutes
ASK_SECONDS = 60  # to wait for a program's --help
# With these of llama.cpp's variables it would answer elsewhere; the others are the user's to set.
_UNREACHABLE = ("LLAMA_ARG_API_PREFIX", "LLAMA_ARG_SSL_KEY_FILE", "LLAMA_ARG_SSL_CERT_FILE")
ATTEMPTS = 3  # ports tried: another process may take one between its choice and its use
NEEDED = ("--model", "--host", "--port", "--ctx-size", "--parallel", "--threads", "--gpu-layers")


@dataclass(frozen=True)
class ModelFacts:
    """What a server and a file say of their model; equal for the same model in the same type."""

    vocabulary: int
    width: int
    parameters: int
    bytes: int  # of all tensors

    def __str__(self) -> str:
        size = f"{self.parameters / 1e6:.1f}M parameters in {self.bytes / 1e6:.1f} MB"
        return f"{size}, width {self.width}, {self.vocabulary} tokens"


def facts_of(file: Path) -> ModelFacts:
    """Those of a GGUF file; of a split one, given its first part, of all parts."""
    from gguf import GGML_QUANT_SIZES

    header = read_header(file)
    width = header.get(f"{header.get('general.architecture')}.embedding_length", 0)
    parameters = size = 0
    for part in split_files(file):
        for tensor in read_tensors(part).values():
            block, bytes_per_block = GGML_QUANT_SIZES[tensor.kind]  # type: ignore[index]  # an IntEnum's keys
            parameters += tensor.size
            size += tensor.size // block * bytes_per_block
    return ModelFacts(header.get("tokenizer.ggml.tokens", 0), width, parameters, size)


class LlamaServer:
    """A llama-server that answers at `url`. `UserError` if nothing does, or not as this runtime needs it.

    `name` is what messages call it. `slots` texts of `context` tokens fit in it at once.
    """

    processes: tuple[int, ...] = ()  # ids of those that were started for it

    def __init__(self, url: str, name: str, key: str | None = None):
        self.url, self._name, self._address = url.rstrip("/"), name, parse_url(url)
        self._key = key or os.environ.get(KEY)
        state = self._get("/health")
        if "error" in state:
            raise UserError(f"{name} is not ready: {_message(state)}; wait until it is")
        props, models = self._get("/props"), self._get("/v1/models")
        self.build = str(props.get("build_info", "of an unknown build"))
        try:
            self.slots = int(props["total_slots"])
            self.context = int(props["default_generation_settings"]["n_ctx"])
            meta = models["data"][0]["meta"]
            self.facts = ModelFacts(*(int(meta[key]) for key in ("n_vocab", "n_embd", "n_params", "size")))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise self._too_old("/props and /v1/models lack what they say today") from error
        probe = {"prompt": [0], "n_predict": 1, "return_tokens": True, "cache_prompt": False}
        answer = self.ask("/completion", probe)
        if not isinstance(answer.get("tokens"), list) or "timings" not in answer or "stop_type" not in answer:
            raise self._too_old("its answers have no token ids or timings")

    def _too_old(self, why: str) -> UserError:
        build = f" ({self.build})"
        return UserError(f"{self._name}{build} is too old, or serves no single model: {why}; use a newer llama-server")

    @property
    def device(self) -> str:
        """What it runs on, as far as it is known."""
        return f"{self.url} (llama-server {self.build})"

    def check_model(self, file: Path) -> None:
        """`UserError` unless the server's model is this file's."""
        expected = facts_of(file)
        if self.facts != expected:
            raise UserError(f"{self._name} serves another model than {file}: it has {self.facts}; the file {expected}")

    def ask(self, path: str, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a POST; the server's own refusals are under "error". Raises `ServerGone`."""
        return self._talk("POST", path, json.dumps(request))

    def _get(self, path: str) -> dict[str, Any]:
        return self._talk("GET", path, None)

    def _talk(self, method: str, path: str, body: str | None) -> dict[str, Any]:
        address = self._address
        secure = address.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection  # neither goes through a proxy
        assert address.hostname is not None
        # One connection per request: on a kept-alive one, every answer would wait 40 ms for its header's ACK.
        connection = kind(address.hostname, address.port, timeout=ANSWER_SECONDS)
        headers = {"Content-Type": "application/json", "Connection": "close"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            connection.request(method, address.path.rstrip("/") + path, body, headers)
            response = connection.getresponse()
            status, text = response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            raise ServerGone(self._why_gone(error)) from error
        finally:
            connection.close()
        return self._parsed(path, status, text)

    def _parsed(self, path: str, status: int, text: bytes) -> dict[str, Any]:
        if status == 401:
            raise UserError(f"{self._name} wants an API key: set {KEY} to it")
        try:
            answer = json.loads(text)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise UserError(f"{self._name} does not answer as llama-server does: {path} gave status {status}")
        return answer if status == 200 or "error" in answer else {"error": {"message": f"status {status}"}}

    def _why_gone(self, error: Exception) -> str:
        return f"{self._name} cannot be reached: {str(error) or type(error).__name__}"

    def close(self) -> None:
        """Nothing: whoever started it ends it."""


def _message(answer: Mapping[str, Any]) -> str:
    error = answer["error"]
    return str(error.get("message", error) if isinstance(error, dict) else error)


def parse_url(url: str) -> SplitResult:
    """The parts of a server's address. `UserError` if it has no host, or a port that is none."""
    try:
        address = urlsplit(url)
        if address.scheme in ("http", "https") and address.hostname and address.port != 0:
            return address
    except ValueError:
        pass
    raise UserError(f"--llama-server {url}: not an address; give one such as http://127.0.0.1:8080")


def connect(place: Place) -> LlamaServer:
    """The server that runs at the address of `place`."""
    url = place.llama_server or ""
    return LlamaServer(url, f"the llama-server at {url}")


def served_artifact(manifest: BundleManifest, bundle: Path, kind: str | None, place: Place) -> ArtifactEntry:
    """Which of a bundle's GGUF files, of a type if one is given, the server of `place` runs. `UserError` if none."""
    server = connect(place)
    files = [entry for entry in manifest.artifacts if entry.format == "gguf"]
    named = [entry for entry in files if kind is None or entry.type.lower() == kind.lower()]
    for entry in named:
        if facts_of(bundle / entry.path) == server.facts:
            return entry
    listed = "; ".join(f"{entry.role}: {facts_of(bundle / entry.path)}" for entry in named or files) or "no GGUF file"
    raise UserError(
        f"the llama-server at {server.url} serves {server.facts}, and {bundle} has another model{_of(kind)}: {listed}"
    )


def _of(kind: str | None) -> str:
    return "" if kind is None else f" in {kind}"


def running_server(file: Path, draft: Path | None, kv_type: str, place: Place) -> LlamaServer:
    """The running server of `place`. `UserError` for another model, and for what only its start could set."""
    server = connect(place)
    for option, asked in (("a draft depth", draft is not None), (f"--kv-type {kv_type}", kv_type != GGUF_CACHE)):
        if asked:
            raise UserError(f"{option} is set when a llama-server starts, and {server.url} already runs: leave it out")
    server.check_model(file)
    return server


@dataclass(frozen=True)
class Program:
    """A llama-server on this machine."""

    path: str
    options: frozenset[str]  # that it takes
    devices: tuple[str, ...] | None  # GPUs, as it names them; None: it cannot say

    @property
    def has_gpu(self) -> bool:
        return self.devices is None or bool(self.devices)


@cache
def program(given: str) -> Program:
    """The program at a path, or of this name on PATH, and what it says of itself. `UserError` if it is none."""
    path = shutil.which(os.path.expanduser(given))
    if path is None:
        raise UserError(f"--llama-server {given}: there is no such program, nor is it an address (http://…)")
    options = frozenset(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", _said_by(path, "--help")))
    lacking = [option for option in NEEDED if option not in options]
    if lacking:
        raise UserError(f"--llama-server {given}: no llama-server, or too old a one: it takes no {', '.join(lacking)}")
    devices = None
    if "--list-devices" in options:
        _, _, listed = _said_by(path, "--list-devices").partition("Available devices:")
        devices = tuple(re.findall(r"^ +(\w+: .+?)(?: \(\d+ MiB.*)?$", listed, re.M))
    return Program(path, options, devices)


def _said_by(path: str, option: str) -> str:
    try:
        done = subprocess.run(
            [path, option], capture_output=True, stdin=subprocess.DEVNULL, timeout=ASK_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"--llama-server {path}: {option} was not answered: {error}") from error
    return (done.stdout + done.stderr).decode(errors="replace")


class StartedServer(LlamaServer):
    """A llama-server of this process's own, on loopback; it ends with `close`, and with this process."""

    def __init__(self, command: list[str], where: str):
        self._key = secrets.token_hex(16)  # other users of this machine cannot ask it
        self._where, self._program = where, command[0]
        self._lines: deque[str] = deque(maxlen=60)
        keeper = [sys.executable, "-I", "-S", str(Path(__file__).with_name("keeper.py"))]
        with short_spins():
            environment = {name: value for name, value in os.environ.items() if name not in _UNREACHABLE}
            environment[KEY] = self._key
        # A session of its own: Ctrl-C in the terminal ends an answer, not the server.
        self._process = subprocess.Popen(
            [*keeper, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        threading.Thread(target=self._listen, name="llama-server's log", daemon=True).start()

    def wait(self, port: int) -> bool:
        """Wait until it answers; False if it could not have the port. `UserError` with its reason if it ends."""
        pause = 0.02
        while self._process.poll() is None:
            if _answers(port):
                super().__init__(f"http://127.0.0.1:{port}", f"llama-server ({self._program})", self._key)
                self.processes = _children(self._process.pid)
                return True
            time.sleep(pause)
            pause = min(2 * pause, 0.5)
        if any("bind" in line for line in self._lines):
            return False
        raise UserError(self._why_gone(None))

    @property
    def device(self) -> str:
        return f"{self._where} in llama-server {self.build}"

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.append(line.decode(errors="replace").strip())

    def _why_gone(self, error: Exception | None) -> str:
        try:
            code = self._process.wait(2)
        except subprocess.TimeoutExpired:
            return super()._why_gone(error or OSError())
        return f"llama-server ({self._program}) ended with code {code}: {self._reason()}"

    def _reason(self) -> str:
        lines = [line for line in self._lines if line]
        marked = [line.split("error loading model: ", 1)[1] for line in lines if "error loading model: " in line]
        errors = [line for line in lines if "error" in line.lower() or "failed" in line.lower()]
        return (marked or errors[-1:] or lines[-1:] or ["it said nothing"])[0][:300]

    def close(self) -> None:
        if self._process.stdin is not None and not self._process.stdin.closed:
            self._process.stdin.close()
            self._process.wait()


def _children(process: int) -> tuple[int, ...]:
    try:
        return tuple(child.pid for child in psutil.Process(process).children())
    except psutil.Error:  # it has ended
        return ()


def _answers(port: int) -> bool:
    """Whether a server there is ready."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health", headers={"Connection": "close"})
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def start_server(
    file: Path,
    threads: int,
    slots: int,
    context: int,
    draft: Path | None,
    draft_tokens: int,
    kv_type: str,
    place: Place,
) -> StartedServer:
    """Start the program of `place` as `open_server` would open the file. `UserError` with its reason if it ends, and
    for layers on a GPU that it does not find."""
    found = program(place.llama_server or "")
    if place.layers and not found.has_gpu:
        raise UserError(
            f"--gpu-layers {place.layers}: {found.path} finds no GPU, so they would run on the CPU: leave it out, "
            "or give a llama-server that is built for your GPU"
        )
    where = "cpu" if not found.has_gpu or place.layers == 0 else ", ".join(found.devices or ["a GPU, if it has one"])
    where += f" with {place.layers} layers" if place.layers else ""
    for _ in range(ATTEMPTS):
        port = _free_port()
        own = ["--model", str(file), "--host", "127.0.0.1", "--port", str(port), "--threads", str(threads)]
        own += ["--ctx-size", str(context * slots), "--parallel", str(slots)]
        own += _options(found, draft, draft_tokens, kv_type, place)
        server = StartedServer([found.path, *own], where)
        try:
            if server.wait(port):
                server.check_model(file)
                return server
        except BaseException:
            server.close()
            raise
    raise UserError(f"llama-server ({found.path}) could not have a port on 127.0.0.1: {server._reason()}")


def _options(found: Program, draft: Path | None, draft_tokens: int, kv_type: str, place: Place) -> list[str]:
    """Further options: those that this build takes."""
    fitted = place.layers is None and found.has_gpu
    wanted = [
        ("--no-warmup",),
        ("--no-webui",),
        ("--no-slots",),
        ("--offline",),
        ("--no-kv-unified",),
        ("--swa-full",),  # without it, sliding-window models would read each prompt from its start again
        ("--cache-ram", "0"),  # no second copy of prompts that left their slot
        *([] if fitted else [("--fit", "off")]),
    ]
    options = [part for option in wanted if option[0] in found.options for part in option]
    if place.layers is not None:
        options += ["--gpu-layers", str(place.layers)]
    if kv_type != GGUF_CACHE:
        options += ["--cache-type-k", kv_type, "--cache-type-v", kv_type, "--flash-attn", "on"]
    if draft is not None:
        most = next((name for name in ("--spec-draft-n-max", "--draft-max") if name in found.options), None)
        if most is None:
            raise UserError(f"{found.path} is too old to draft: leave out the draft, or use a newer llama-server")
        options += ["--model-draft", str(draft), most, str(draft_tokens)]
        options += ["--spec-type", "draft-simple"] if "--spec-type" in found.options else []
        options += ["--gpu-layers-draft", str(place.layers)] if place.layers is not None else []
    return options


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
