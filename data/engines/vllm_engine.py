"""vLLM, on a GPU; an optional package."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...stage import Context
from ..sampling import Sampled, Sampling
from . import settle


class Vllm:
    """The unpruned model in vLLM, which batches and shares prefixes by itself; texts of up to `length` tokens."""

    def __init__(self, base: Path, context: Context, length: int, memory: float):
        try:
            import vllm  # type: ignore[import-not-found]
        except ImportError as error:
            raise UserError(f"data.engine: vllm cannot be imported ({error}); or take engine: transformers") from error
        self.vllm: Any = vllm
        self.model: Any = vllm.LLM(
            model=str(base),
            dtype=context.dtype,
            seed=context.seed,
            max_model_len=length,
            gpu_memory_utilization=memory,
            enable_prefix_caching=True,
            generation_config="vllm",  # only what we ask for
        )

    def sample(
        self,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        how: Sampling,
        *,
        stop: Collection[int],
        banned: Sequence[int] = (),
    ) -> list[Sampled]:
        each = [
            self.vllm.SamplingParams(
                max_tokens=how.max_tokens,
                temperature=how.temperature,
                top_p=how.top_p,
                top_k=how.top_k or -1,
                seed=seed,
                stop_token_ids=sorted(stop),
                logit_bias={token: -100.0 for token in banned} or None,
                detokenize=False,
            )
            for seed in seeds
        ]
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = self.model.generate(asked, each, use_tqdm=False)
        found = []
        for output in outputs:
            row = settle(output.outputs[0].token_ids, stop, how.max_tokens)
            # Whether the token that ended a text is among its tokens is vLLM's choice.
            row.ended = row.ended or (output.outputs[0].finish_reason == "stop" and not row.looped)
            found.append(row)
        return found

    def close(self) -> None:
        self.model = None
