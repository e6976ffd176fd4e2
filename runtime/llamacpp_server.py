"""llama.cpp's server, for both scoring and sampling a GGUF file: in this process through xllamacpp, or the user's own.
No torch."""

from __future__ import annotations

import http.client
import json
import os
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from ..core.errors import UserError
from ..core.machine import short_spins
from ..core.place import ANYWHERE, Place
from ..core.suggest import did_you_mean
from .artifact_types import GGUF_CACHE, GGUF_CACHES

LOG_SECONDS = 5  # to wait for llama.cpp's message on why it cannot load a file
ALL = -1  # layers on the GPU, in llama.cpp's numbers
_GPUS = ("GGML_BACKEND_DEVICE_TYPE_GPU", "GGML_BACKEND_DEVICE_TYPE_IGPU")
BLOCK = 32  # numbers of a block of q8_0
SEEDS = 2**32 - 1  # llama.cpp takes the number after the last of these for "any"


class ServerGone(UserError):
    """The server ended, or cannot be reached any more."""


class Server(Protocol):
    """llama.cpp's server with one model: in this process, the user's own started by this one, or one that runs."""

    slots: int  # texts at a time
    context: int  # tokens of each, the one that is sampled last included
    processes: tuple[int, ...]  # ids of processes that were started for it

    @property
    def device(self) -> str:
        """What it runs on."""
        ...

    def ask(self, path: str, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a POST of JSON; a refusal is under "error"."""
        ...

    def close(self) -> None:
        """Free the memory; closing twice does nothing."""
        ...


class OwnServer:
    """`xllamacpp.Server`, in this process."""

    processes: tuple[int, ...] = ()

    def __init__(self, server: Any, slots: int, context: int, device: str):
        self._server: Any = server
        self.slots, self.context, self.device = slots, context, device

    def ask(self, path: str, request: Mapping[str, Any]) -> dict[str, Any]:
        if path == "/v1/completions":
            return self._server.handle_completions(dict(request))
        return post(self._server, path, dict(request))

    def close(self) -> None:
        self._server = None


def open_server(
    file: Path,
    threads: int,
    slots: int,
    context: int,
    draft: Path | None = None,
    draft_tokens: int = 4,
    kv_type: str = GGUF_CACHE,
    place: Place = ANYWHERE,
) -> Server:
    """A ready server on `file`, with `slots` slots of `context` tokens each (one that already runs has its own).

    `draft` is a GGUF file of the same vocabulary that proposes `draft_tokens` at a time; `kv_type` is the type of keys
    and values, one of `GGUF_CACHES`. Raises `UserError`, with llama.cpp's own reason, where a file is missing or
    broken, and for layers on a GPU that this build of llama.cpp does not have.
    """
    if place.llama_server is not None:
        from .llama_server import running_server, start_server

        if place.is_running:
            return running_server(file, draft, kv_type, place)
        return start_server(file, threads, slots, context, draft, draft_tokens, kv_type, place)
    layers, fit = gpu_layers(place)
    xllamacpp = _import()
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx = context * slots
    parameters.n_parallel = slots
    parameters.kv_unified = False
    if kv_type != GGUF_CACHE:
        kind = xllamacpp.ggml_type[f"GGML_TYPE_{kv_type.upper()}"]
        parameters.cache_type_k = parameters.cache_type_v = kind
    parameters.swa_full = True  # without it, sliding-window models would read each prompt from its start again
    parameters.cache_ram_mib = 0  # no second copy of prompts that left their slot
    parameters.n_gpu_layers, parameters.fit_params = layers, fit
    parameters.warmup = False
    parameters.endpoint_slots = False
    parameters.ui = False
    parameters.cpuparams.n_threads = threads
    parameters.cpuparams_batch.n_threads = threads
    if draft is not None:
        guess = parameters.speculative
        guess.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
        guess.draft.mparams.path = str(draft)
        guess.draft.n_max = draft_tokens
        guess.draft.n_gpu_layers = layers
        guess.draft.cpuparams.n_threads = threads
        guess.draft.cpuparams_batch.n_threads = threads
    parameters.verbosity = 0  # llama.cpp writes nothing to the terminal
    try:
        server = xllamacpp.Server(parameters)
    except RuntimeError as error:
        parameters.verbosity = 1  # errors only: load again to learn why, catching what it writes
        raise UserError(f"llama.cpp cannot load {file}: {_reason(xllamacpp, parameters)}") from error
    # A server that is closed before its loop has started waits for it forever; an answer shows that it runs.
    checked(post(server, "/completion", {"prompt": [0], "n_predict": 0, "cache_prompt": False}), file)
    return OwnServer(server, slots, context, device_name(place))


def gpus() -> list[str]:
    """The GPUs that llama.cpp, as it is installed, finds: the backend's name of each with the device's own."""
    return [
        f"{device['name']} ({device['description']})"
        for device in _import().get_device_info()
        if device["type"].name in _GPUS
    ]


def gpu_layers(place: Place) -> tuple[int, bool]:
    """(llama.cpp's number of layers on the GPU, whether it is to lower that until they fit). `UserError` for layers
    where there is no GPU: llama.cpp would run them on the CPU and say nothing."""
    found = gpus()
    if place.layers is None:
        return ALL, bool(found)
    if place.layers and not found:
        raise UserError(
            f"--gpu-layers {place.layers}: llama.cpp as installed (xllamacpp {version('xllamacpp')}) finds no "
            "GPU, so they would run on the CPU: leave it out, or install the build for your GPU (CUDA, ROCm, Vulkan): "
            "https://github.com/xorbitsai/xllamacpp#installation"
        )
    return place.layers, False


def device_name(place: Place) -> str:
    """Where a server in this process runs a model: cpu, or the GPU with how many layers go to it."""
    found = gpus() if place.layers != 0 else []
    if not found:
        return "cpu"
    return f"{', '.join(found)}" + ("" if place.layers is None else f" with {place.layers} layers")


def check_kv_type(kv_type: str, header: Mapping[str, Any], file: Path) -> None:
    """`UserError` unless llama.cpp can hold a model's keys and values so; `header` is its file's."""
    if kv_type not in GGUF_CACHES:
        raise UserError(
            f"--kv-type {kv_type}: llama.cpp holds keys and values as {' or '.join(GGUF_CACHES)}"
            f"{did_you_mean(kv_type, GGUF_CACHES)}"
        )
    name = header.get("general.architecture")
    heads, width = header.get(f"{name}.attention.head_count"), header.get(f"{name}.embedding_length")
    size = header.get(f"{name}.attention.key_length", width // heads if heads and width else 0)
    if kv_type != GGUF_CACHE and size % BLOCK:
        raise UserError(
            f"--kv-type {kv_type}: its blocks are of {BLOCK} numbers, and the heads of {file} have {size}; leave it out"
        )


def post(server: Any, path: str, request: dict[str, Any]) -> dict[str, Any]:
    """The server's answer over HTTP, an error under "error". Never through a proxy: it is this process."""
    address = urlsplit(server.listening_address)
    assert address.hostname is not None
    # One connection per request: on a kept-alive one, every answer would wait 40 ms for its header's ACK.
    connection = http.client.HTTPConnection(address.hostname, address.port)
    try:
        headers = {"Content-Type": "application/json", "Connection": "close"}
        connection.request("POST", path, json.dumps(request), headers)
        return json.load(connection.getresponse())
    finally:
        connection.close()


def checked(answer: dict[str, Any], what: object) -> dict[str, Any]:
    """A server's answer; `UserError` with its reason if it refused `what`."""
    if "error" in answer:
        raise UserError(f"llama.cpp refused {what}: {answer['error'].get('message', answer['error'])}")
    return answer


def _import() -> Any:
    with short_spins():
        import xllamacpp
    return xllamacpp


def _reason(xllamacpp: Any, parameters: Any) -> str:
    """Why loading fails, from what llama.cpp writes to file descriptor 2."""
    marker = "error loading model: "
    with tempfile.TemporaryFile() as log:
        kept = os.dup(2)
        os.dup2(log.fileno(), 2)
        try:
            xllamacpp.Server(parameters)
        except RuntimeError:
            pass
        finally:
            text = _settled(log.fileno(), marker)
            os.dup2(kept, 2)
            os.close(kept)
    reasons = [line.split(marker, 1)[1] for line in text.splitlines() if marker in line]
    return reasons[0].removeprefix("llama_model_loader: ") if reasons else "the file is broken or unsupported"


def _settled(descriptor: int, marker: str) -> str:
    """A file's contents once it has the marker and stops growing: llama.cpp writes from a thread of its own, which may
    be late on a busy machine. Without a marker after `LOG_SECONDS`, what there is."""
    text, end = "", time.monotonic() + LOG_SECONDS
    while time.monotonic() < end:
        before, text = (
            text,
            os.pread(descriptor, 1 << 20, 0).decode(errors="replace"),
        )  # does not move the writer's offset
        if marker in text and text == before:
            break
        time.sleep(0.05)
    return text
