"""Which of ONNX Runtime's execution providers a graph runs on, and that it does.

ONNX Runtime falls back to the CPU in silence: where a provider is missing or cannot start, and operation by operation
where it has no kernel. Here the first two are errors, and so is a matrix product or an attention left on the CPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.place import Place
from ..core.suggest import did_you_mean

CPU = "CPUExecutionProvider"


@dataclass(frozen=True)
class Provider:
    """An execution provider, and the package that has it."""

    name: str
    package: str


PROVIDERS = {
    "cpu": Provider(CPU, "onnxruntime"),
    "cuda": Provider("CUDAExecutionProvider", "onnxruntime-gpu"),
    "dml": Provider("DmlExecutionProvider", "onnxruntime-directml"),
    "webgpu": Provider("WebGpuExecutionProvider", "onnxruntime-webgpu"),
    "coreml": Provider("CoreMLExecutionProvider", "onnxruntime on macOS"),
    "openvino": Provider("OpenVINOExecutionProvider", "onnxruntime-openvino"),
    "migraphx": Provider("MIGraphXExecutionProvider", "onnxruntime-migraphx"),
}
AUTO = ("cuda", "dml", "webgpu")  # in this order: providers in packages that one installs for a GPU
# Operations that take nearly all the time, and whose inputs and outputs would cross to the CPU and back.
HEAVY = frozenset(
    {"MatMul", "Gemm", "MatMulNBits", "MatMulInteger", "GroupQueryAttention", "MultiHeadAttention", "Attention"}
)
_ASSIGNMENT = "session.record_ep_graph_assignment_info"


@dataclass(frozen=True)
class Opened:
    """Sessions of one model, all on one provider."""

    sessions: list[Any]
    device: str  # its name, for the user

    @property
    def on_cpu(self) -> bool:
        """Whether arrays in memory are used where they are."""
        return self.device.startswith("cpu")


def open_sessions(graphs: Sequence[str | bytes], options: Callable[[], Any], place: Place, what: Path) -> Opened:
    """ONNX Runtime on graphs (files, or models in memory) at `place`; `options` makes the options of a session.

    `auto` takes the first GPU provider that the installed build has and that runs the graphs, else the CPU, and
    `device` then says why. Raises `UserError` for a provider that is missing, cannot start, or leaves products or
    attention to the CPU.
    """
    name = choose_device(place)
    try:
        return Opened([_open(graph, options(), name, place, what) for graph in graphs], name)
    except UserError as error:
        if place.device != "auto" or name == "cpu":
            raise
        reason = str(error)
    return Opened([_open(graph, options(), "cpu", place, what) for graph in graphs], f"cpu, because {reason}")


def choose_device(place: Place) -> str:
    """A name of `PROVIDERS`. `UserError` for one that is unknown, or that the installed build lacks."""
    import onnxruntime

    available = onnxruntime.get_available_providers()
    if place.device == "auto":
        name = next((name for name in AUTO if PROVIDERS[name].name in available), "cpu")
    else:
        check_name(place)
        name = place.device
        if PROVIDERS[name].name not in available:
            raise UserError(
                f"--device {name}: the installed ONNX Runtime {onnxruntime.__version__} has no {PROVIDERS[name].name}: "
                f"install {PROVIDERS[name].package} in place of onnxruntime, or use --device cpu"
            )
    if name == "cpu" and place.provider_options:
        raise UserError("--provider-option: the CPU has none; name the device that they are for with --device")
    return name


def check_name(place: Place) -> None:
    """`UserError` for a device that is neither auto nor in `PROVIDERS`."""
    names = ("auto", *PROVIDERS)
    if place.device not in names:
        raise UserError(
            f"--device {place.device}: there is no such device; there are: {', '.join(names)}"
            f"{did_you_mean(place.device, names)}"
        )


def _open(graph: str | bytes, options: Any, name: str, place: Place, what: Path) -> Any:
    import onnxruntime

    provider = PROVIDERS[name].name
    wanted: list[Any] = [CPU]
    if name != "cpu":
        wanted = [(provider, dict(place.provider_options)), CPU]  # the CPU for what is about shapes
        options.add_session_config_entry(_ASSIGNMENT, "1")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a provider is missing, which is an error below
            session = onnxruntime.InferenceSession(graph, options, providers=wanted, enable_fallback=0)
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        where = "" if name == "cpu" else f" on {name}"
        raise UserError(f"ONNX Runtime cannot load {what}{where}: {first_line(error)}") from error
    if name != "cpu":
        _check_runs_there(session, name, what)
    return session


def _check_runs_there(session: Any, name: str, what: Path) -> None:
    provider = PROVIDERS[name].name
    if session.get_providers()[0] != provider:
        raise UserError(
            f"--device {name}: {provider} did not start for {what}, and ONNX Runtime would go on on the CPU: check its "
            "driver and libraries, or use --device cpu"
        )
    tell = getattr(session, "get_provider_graph_assignment_info", None)  # since ONNX Runtime 1.24
    parts = [] if tell is None else tell()
    left = sorted({node.op_type for part in parts if part.ep_name == CPU for node in part.get_nodes()} & HEAVY)
    if left:
        raise UserError(
            f"--device {name}: {provider} has no {' and no '.join(left)} for the type of {what}, and would leave it to "
            "the CPU, all its inputs crossing over: use another type, or --device cpu"
        )


def first_line(error: Exception) -> str:
    """The first line of an error, for a message."""
    return str(error).strip().splitlines()[0][:300]
