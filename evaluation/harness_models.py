"""Our models wrapped for lm-eval. Imports lm-eval, so import this module only when needed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ..modeling.checkpoint import quiet
from ..modeling.types import CausalModel, ModelTokenizer
from ..runtime.engine import Engine, ScoringWindow

AT_ONCE = 16  # requests handed to a runtime together


def checkpoint_lm(model: CausalModel, tokenizer: ModelTokenizer, longest: int, batch: int) -> Any:
    """A loaded checkpoint in lm-eval's own class for transformers models.

    Texts longer than `longest` tokens, or than the model's context, are truncated on the left.
    """
    trained = getattr(model.config, "max_position_embeddings", longest)
    make: Any = HFLM  # its decorator hides the signature
    with quiet():
        return make(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),  # lm-eval sets a padding token on it
            batch_size=batch,
            max_length=min(longest, trained),
            backend="causal",
        )


class EngineLM(TemplateLM):
    """An artifact in its runtime; gets the same tokens as a checkpoint, truncated the same way."""

    def __init__(self, engine: Engine, tokenizer: ModelTokenizer, longest: int):
        super().__init__()
        self.engine, self.tokenizer = engine, tokenizer
        # The last token of a text of max_length + 1 tokens is only predicted, never read.
        self.max_length = min(longest, engine.context - 1)

    @property
    def eot_token_id(self) -> int:
        assert self.tokenizer.eos_token_id is not None
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: object) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: object
    ) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = []
        for start in range(0, len(requests), AT_ONCE):
            part = requests[start : start + AT_ONCE]
            windows = []
            for _, before, ending in part:
                ids = [*before, *ending][-(self.max_length + 1) :]
                windows.append(ScoringWindow.of(ids, max(1, len(ids) - len(ending))))
            for request, scores in zip(part, self.engine.score(windows, top_k=1), strict=True):
                total = sum(score.target_logprob for score in scores)
                results.append((total, all(score.top == score.target for score in scores)))
                if request[0] is not None:
                    self.cache_hook.add_partial("loglikelihood", request[0], results[-1])
        return results

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in lm-eval's rolling windows."""
        sums = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            sums.append(sum(logprob for logprob, _ in self._loglikelihood_tokens(parts)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), sums[-1])
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The text generated after each prompt, up to the first of the request's stop strings."""
        texts = []
        for prompt, settings in (request.args for request in requests):
            options: dict[str, Any] = dict(normalize_gen_kwargs(settings))
            room = options["max_gen_toks"]
            ids = self.tok_encode(prompt)[-max(1, self.max_length - room) :]
            texts.append(self._write(ids, room, [text for text in options["until"] if text], options))
            self.cache_hook.add_partial("generate_until", (prompt, settings), texts[-1])
        return texts

    def _write(self, ids: list[int], room: int, until: list[str], options: dict[str, Any]) -> str:
        tokens: list[int] = []
        text = ""
        temperature, top_p = float(options.get("temperature", 0.0)), float(options.get("top_p", 1.0))
        drawn = self.engine.generate(ids, room, temperature=temperature, top_p=top_p, stop=(self.eot_token_id,))
        for token in drawn:
            tokens.append(token)
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            ends = [text.find(stop) for stop in until if stop in text]
            if ends:
                return text[: min(ends)]
        return text
