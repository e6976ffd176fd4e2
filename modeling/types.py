"""Protocols of transformers' objects, for annotations; importing this imports neither torch nor transformers.

`load_config`, `load_model` and `load_tokenizer` return objects with these attributes, whatever their classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

    class ModelConfig(PreTrainedConfig):
        """The configuration of a decoder-only model: what all families have."""

        num_hidden_layers: int
        hidden_size: int
        intermediate_size: int
        num_attention_heads: int
        num_key_value_heads: int
        vocab_size: int
        max_position_embeddings: int
        rms_norm_eps: float
        tie_word_embeddings: bool

    class CausalModel(PreTrainedModel):
        """A decoder-only language model: embedding, blocks and final norm in `model`, the head beside it."""

        config: ModelConfig
        model: Any  # has embed_tokens, layers, norm and rotary_emb
        lm_head: nn.Linear

        @property
        def device(self) -> torch.device: ...

    ConfigLike = ModelConfig | dict[str, Any]  # or the values of a config.json
else:
    ModelConfig = CausalModel = ConfigLike = object


class ModelTokenizer(Protocol):
    """A fast tokenizer."""

    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    chat_template: Any  # text, or texts by name
    name_or_path: str

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]: ...  # the further tokens by their ids

    def __call__(
        self,
        text: str,
        *,
        add_special_tokens: bool = True,
        return_offsets_mapping: bool = False,
        verbose: bool = True,
    ) -> Mapping[str, Any]: ...  # input_ids: list[int]; offset_mapping: list[tuple[int, int]]

    def __len__(self) -> int: ...

    def decode(
        self,
        token_ids: int | Sequence[int],
        skip_special_tokens: bool = False,
        *,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> str: ...

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str: ...

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        tools: Sequence[dict[str, Any] | Callable[..., Any]] | None = None,
        *,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        **options: Any,
    ) -> str: ...

    def save_pretrained(self, save_directory: str | Path) -> Any: ...
