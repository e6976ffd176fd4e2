"""Tiny random checkpoints of every family, for tests and for trying recipes in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ..core.errors import UserError
from .checkpoint import save_checkpoint
from .families import FAMILIES
from .pretokenizers import PRE_TOKENIZERS
from .types import CausalModel

FORMAT = 1
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_WORDS = (
    "the of and to in is that for it was on are as with his they be at one have this from or had by word but "
    "what some we can out other were all there when up use your how said an each she which do their time if "
    "will way about many then them write would like so these her long make thing see him two has look more day "
    "user assistant model number people water part sound work place"
).split()


def build_tokenizer(pre: str = "smollm") -> Any:
    """A byte-level BPE tokenizer of about 500 tokens with a ChatML template; `pre` names its pre-tokenizer."""
    vocabulary = {token: number for number, token in enumerate(SPECIAL_TOKENS)}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[character] = len(vocabulary)
    merges: list[tuple[str, str]] = []
    for word in _WORDS:
        left = "Ġ"
        for character in word:
            if left + character not in vocabulary:
                vocabulary[left + character] = len(vocabulary)
                merges.append((left, character))
            left += character
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    normalizer, pre_tokenizer = PRE_TOKENIZERS[pre]
    tokenizer.normalizer = normalizers.NFC() if normalizer else None  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizer_from_json(pre_tokenizer)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def pre_tokenizer_from_json(part: dict[str, Any]) -> Any:
    """The `tokenizers` object of a tokenizer.json `pre_tokenizer` entry."""
    empty = json.loads(Tokenizer(models.BPE()).to_str())
    empty["pre_tokenizer"] = part
    return Tokenizer.from_str(json.dumps(empty)).pre_tokenizer


def random_model(
    family: str = "llama",
    *,
    vocab_size: int,
    blocks: int = 4,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    intermediate: int = 96,
    tied: bool = True,
    seed: int = 0,
    max_positions: int = 512,
    eos: int = 2,
    **overrides: Any,
) -> Any:
    """A random model of a real architecture class, float32, in evaluation mode; the same for the same arguments.

    Its end-of-turn token has a probability of roughly one in ten, so that generated texts end.
    `overrides` go to the configuration class.
    """
    if family not in FAMILIES:
        raise UserError(f"no random model of family {family!r}; there are: {', '.join(sorted(FAMILIES))}")
    record = FAMILIES[family]
    config_class, model_class = (getattr(transformers, name) for name in (record.config_class, record.model_class))
    values: dict[str, Any] = {
        "vocab_size": vocab_size,
        "num_hidden_layers": blocks,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": eos,
        "pad_token_id": eos,
        "initializer_range": 0.1,
    }
    sizes = {
        "head_dim": hidden // heads,
        "query_pre_attn_scalar": hidden // heads,
        "original_max_position_embeddings": max_positions,
        "sliding_window": 64 if record.windows == "by type" else None,
    }
    values |= {name: size for name, size in sizes.items() if hasattr(config_class, name)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config_class(**(values | overrides))).eval()
        _favour(model, eos)
    return model


@torch.no_grad()
def _favour(model: CausalModel, token: int) -> None:
    """Raise one token's logits by about 4: every embedding gets a common direction, which the token's row reads."""
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    direction = torch.randn(embedding.shape[1])
    embedding += 0.1 * direction
    ids = torch.randint(0, embedding.shape[0], (4, 32))
    mean = model.model(ids).last_hidden_state.mean((0, 1))
    head[token] += 4.0 * mean / mean.dot(mean)


def random_checkpoint(folder: Path, family: str = "llama", *, pre: str = "smollm", **options: Any) -> Path:
    """Write a random checkpoint with its tokenizer into `folder`; `options` as for `random_model`."""
    tokenizer = build_tokenizer(pre)
    options.setdefault("vocab_size", len(tokenizer))
    save_checkpoint(random_model(family, **options), tokenizer, folder)
    return folder
