"""The recipe's `data` section."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, SerializationInfo, field_serializer, model_validator

from ..core.registry import named
from ..core.stage import Section
from .checks import CHECKS, COLUMNS, Check
from .checks.none import Unchecked
from .checks.number import FinalNumber
from .drills_config import Drills, DrillsBeside
from .prose_config import SUFFIXES, Decontaminate, Prose, ProseBeside

FORMAT = 3
if TYPE_CHECKING:
    AnyCheck = Check
else:
    AnyCheck = CHECKS.union()


class TeacherConfig(Section):
    """The unpruned model's most likely next tokens at every trained token, for `distill.teacher: cached`."""

    top_k: int = Field(
        default=64, ge=1, description="tokens stored with log-probabilities; all others share one bucket"
    )
    batch: int = Field(default=1, ge=1, description="packed sequences of `length` tokens per forward pass")


class TransformersSettings(Section):
    """PyTorch: the only engine that reproduces rows byte for byte on the same machine."""

    kind: Literal["transformers"] = "transformers"


class LlamaCppSettings(Section):
    """llama.cpp on a quantized GGUF file of the unpruned model: needs far less memory; for large models on CPUs."""

    kind: Literal["llama.cpp"] = "llama.cpp"
    gguf: str = Field(min_length=1, description="GGUF file of the unpruned model, in any quantization")
    threads: int = Field(default=0, ge=0, description="CPU threads; 0: one per core")


class VllmSettings(Section):
    """vLLM on a GPU, or on a CPU with its CPU build; an optional package."""

    kind: Literal["vllm"] = "vllm"
    memory: float = Field(default=0.9, gt=0, le=1, description="share of GPU memory that vLLM may use")
    gpus: int = Field(default=1, ge=1, description="GPUs that share the model (tensor parallelism)")


EngineConfig = TransformersSettings | LlamaCppSettings | VllmSettings
EngineChoice = Annotated[EngineConfig, Field(discriminator="kind"), BeforeValidator(named)]


class _Source(Section):
    """Keys that every source has."""

    teacher: TeacherConfig | None = Field(
        default=None, description="also store the unpruned model's top-k log-probabilities; null: do not"
    )


class _Mixed(_Source):
    """Keys of sources that drills can stand beside."""

    drills: DrillsBeside | None = Field(
        default=None, description="exercises in copying, retrieval and arithmetic beside these rows; null: none"
    )


class _Written(_Mixed):
    """Keys of sources whose rows the unpruned model writes, or rewrites."""

    engine: EngineChoice = Field(
        default_factory=TransformersSettings, description="engine that generates text: transformers, llama.cpp or vllm"
    )
    prose: ProseBeside | None = Field(default=None, description="real text beside these rows; null: none")

    def input_files(self) -> list[str]:
        files = [self.engine.gguf] if isinstance(self.engine, LlamaCppSettings) else []
        return files + (self.prose.prose_files() if self.prose else [])


class ProseConfig(_Mixed, Prose):
    """Real text as it is. Nothing is generated: in distillation the unpruned model gives the distribution at every
    token."""

    source: Literal["prose"]
    tokens: int = Field(ge=16, description="how many tokens to learn from and to hold out, together")
    heldout: float = Field(
        default=0.125, gt=0, lt=1, description="share of the tokens held out of training, of other documents"
    )
    length: int = Field(default=512, ge=8, description="documents are cut into rows of this many tokens")

    def input_files(self) -> list[str]:
        return self.prose_files()


class DrillsConfig(_Source, Drills):
    """Exercises that need copying, retrieval or arithmetic, made from templates; their answers are known."""

    source: Literal["drills"]
    rows: int = Field(default=96, ge=2, description="how many rows to make")
    heldout: float = Field(
        default=0.125, gt=0, lt=1, description="share of rows held out of training, at least one row"
    )
    length: int = Field(
        default=512, ge=8, description="maximum row length in tokens; a row has as many exercises as fit, at most four"
    )


class MagpieConfig(_Written):
    """Self-data without a data set: the unpruned model writes prompts and answers (Magpie, arXiv 2406.08464)."""

    source: Literal["magpie"]
    rows: int = Field(default=96, ge=2, description="how many rows to keep")
    heldout: float = Field(
        default=0.125, gt=0, lt=1, description="share of rows held out of training, at least one row"
    )
    batch: int = Field(default=32, ge=1, description="rows sampled together; changing it changes the rows")
    max_prompt_tokens: int = Field(default=64, ge=1, description="maximum prompt tokens; longer prompts are dropped")
    max_tokens: int = Field(
        default=192, ge=1, description="maximum answer tokens; longer answers are cut, see `unfinished`"
    )
    unfinished: Literal["drop", "keep"] = Field(
        default="drop", description="answers cut off at max_tokens: drop, or keep without training on an end of turn"
    )
    length: int = Field(
        default=512, ge=8, description="maximum row length in tokens, chat template included; longer: dropped"
    )
    temperature: float = Field(default=1.0, ge=0, description="sampling temperature for prompts; 1 gives variety")
    top_p: float = Field(default=0.9, gt=0, le=1, description="nucleus sampling mass for prompts")
    top_k: int = Field(
        default=0, ge=0, description="for prompts and answers: sample from the k most likely tokens; 0: all"
    )
    answer_temperature: float = Field(default=0.6, ge=0, description="sampling temperature for answers; 0: greedy")
    answer_top_p: float = Field(default=0.95, gt=0, le=1, description="nucleus sampling mass for answers")
    topics: list[str] = Field(
        default=[], description="topics of the prompts, used in turn; empty: the model's own choice"
    )
    max_attempts: float = Field(default=4.0, ge=1, description="stop after sampling this many times `rows` prompts")


class TextsConfig(_Written):
    """Plain text that the unpruned model writes from random first tokens (LLM-QAT, arXiv 2305.17888): for calibration,
    and for models without a chat template."""

    source: Literal["texts"]
    rows: int = Field(default=128, ge=2, description="how many texts to keep")
    heldout: float = Field(
        default=0.125, gt=0, lt=1, description="share of rows held out of training, at least one row"
    )
    batch: int = Field(default=64, ge=1, description="rows sampled together; changing it changes the rows")
    tokens: int = Field(default=256, ge=8, description="maximum tokens per text; longer texts are cut off")
    openings: list[Annotated[str, Field(min_length=1)]] = Field(
        default=[],
        description="first words of the texts, used in turn: words of your domain; empty: one random token each",
    )
    length: int = Field(default=512, ge=8, description="longer texts are split into windows of this many tokens")
    temperature: float = Field(default=1.0, ge=0, description="sampling temperature; 1: the model's own distribution")
    top_p: float = Field(default=0.95, gt=0, le=1, description="nucleus sampling mass")
    top_k: int = Field(default=0, ge=0, description="sample from the k most likely tokens; 0: all")
    max_attempts: float = Field(default=4.0, ge=1, description="stop after sampling this many times `rows` texts")


class General(Section):
    """The unpruned model rewrites the gold answer in its own words (arXiv 2402.13669, 2410.09982)."""

    kind: Literal["general"] = "general"
    check: AnyCheck = Field(
        default_factory=Unchecked,
        description=f"what must match gold in a rewrite: {CHECKS.listed()} (default: none)",
    )
    marker: str | None = Field(
        default=None,
        min_length=1,
        description="words that introduce the final answer, such as 'Answer:' (default: docs/explanation/self-data.md)",
    )
    own_answer_first: bool = Field(
        default=False,
        description="first try the model's own answer, without gold; used if the check passes (arXiv 2502.08130)",
    )
    max_tokens: int = Field(default=256, ge=1, description="maximum tokens of a rewrite; longer rewrites are rejected")
    temperature: float = Field(default=0.6, ge=0, description="sampling temperature; 0: greedy")
    top_p: float = Field(default=0.95, gt=0, le=1, description="nucleus sampling mass")
    top_k: int = Field(default=0, ge=0, description="sample from the k most likely tokens; 0: all")
    timeout: float = Field(
        default=5.0, gt=0, le=600, description="time limit for one row's tests in seconds (check: python)"
    )
    memory: int = Field(default=512, ge=64, description="memory limit for one row's tests in megabytes (check: python)")

    @model_validator(mode="after")
    def _own_answers_need_a_check(self) -> Self:
        if self.own_answer_first and isinstance(self.check, Unchecked):
            raise ValueError(
                "own_answer_first needs a check: without one there is no way to tell whether the answer is right"
            )
        return self

    @field_serializer("check")
    def _short(self, check: Check, info: SerializationInfo) -> str | dict[str, Any]:
        """A check without options is written as its name."""
        written = check.model_dump(mode=info.mode)
        return check.kind if written.keys() == {"kind"} else written


class Maths(General):
    """Like general, but asks a mathematics expert for a step-by-step solution and starts the answer."""

    kind: Literal["maths"] = "maths"  # type: ignore[assignment]
    check: AnyCheck = Field(
        default_factory=FinalNumber, description="what must match gold in a rewrite, as in general (default: number)"
    )


Rewrite = Annotated[General | Maths, Field(discriminator="kind"), BeforeValidator(named)]


class Columns(Section):
    """Where rows come from, and which columns they are read from."""

    path: str = Field(min_length=1, description="a .jsonl, .json, .parquet or .csv file, or a data set's Hub name")
    subset: str | None = Field(default=None, description="the Hub data set's configuration, if it has several")
    split: str = Field(default="train", description="the Hub data set's split")
    prompt: str | None = Field(
        default=None, description="column with the user's prompt, text or messages up to the answer (default: prompt)"
    )
    context: str | None = Field(default=None, description="column with text to append to the prompt, if any")
    response: str | None = Field(
        default=None, description="column with the answer to train on, text or messages (default: response)"
    )
    messages: str | None = Field(
        default=None, description="column with whole conversations: lists of {role, content} or {from, value}"
    )
    tools: str | None = Field(
        default=None,
        description="column with a conversation's tool definitions (default: tools, if the data set has it)",
    )
    text: str | None = Field(default=None, description="column with plain text, used without a chat template")
    answer: str | None = Field(
        default=None, description="column with the final answer for a check; null: extracted from gold"
    )
    tests: str | None = Field(default=None, description="column with Python tests, for check: python")
    rewrite: Rewrite | None = Field(
        default=None,
        description="general or maths: the unpruned model rewrites the last answer; null: keep gold unchanged",
    )

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        pair = (self.prompt, self.context, self.response) != (None, None, None)
        if pair + (self.messages is not None) + (self.text is not None) > 1:
            raise ValueError("give only one of: prompt and response; messages; text")
        if self.tools is not None and self.text is not None:
            raise ValueError("plain text has no tools: give prompt and response, or messages")
        if self.rewrite is not None and self.text is not None:
            raise ValueError("plain text has no answer to rewrite: give prompt and response, or messages")
        check = self.rewrite.check if self.rewrite is not None else Unchecked()
        for column, holds in COLUMNS.items():
            if column in check.needs and getattr(self, column) is None:
                raise ValueError(f"check: {check.kind} needs {column}: name the column that holds {holds}")
        return self

    @property
    def local(self) -> bool:
        """Whether `path` is a file rather than a Hub name."""
        return PurePath(self.path).suffix.lower() in SUFFIXES

    @property
    def title(self) -> str:
        """A file's name, or the data set's."""
        return PurePath(self.path).name if self.local else self.path

    @property
    def columns(self) -> dict[str, str]:
        """What is read from which column: prompt and response, or messages, or text, and what goes with them."""
        if self.messages is not None:
            columns: dict[str, str | None] = {"messages": self.messages}
        elif self.text is not None:
            columns = {"text": self.text}
        else:
            columns = {"prompt": self.prompt or "prompt", "response": self.response or "response"}
        columns |= {"context": self.context, "tools": self.tools, "answer": self.answer, "tests": self.tests}
        return {key: column for key, column in columns.items() if column is not None}


class WeightedSet(Columns):
    """One data set of several."""

    weight: float = Field(
        default=1.0, gt=0, description="relative weight: its share of the rows is weight / sum of weights"
    )


class RowsFromData(_Written):
    """Keys shared by one data set and several."""

    shuffle: bool = Field(default=False, description="read rows in random order, seeded by the recipe's seed")
    heldout: float = Field(
        default=0.125, gt=0, lt=1, description="share of rows held out of training, at least one row"
    )
    length: int = Field(
        default=512,
        ge=8,
        description="maximum tokens: longer conversations are dropped, longer text is split into windows",
    )
    max_dropped: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="share of a data set's rows that may be unusable before the stage fails; duplicates and "
        "decontaminated rows do not count",
    )
    decontaminate: Decontaminate | None = Field(
        default=None, description="drop rows that overlap with evaluation files"
    )
    batch: int = Field(default=32, ge=1, description="rows rewritten together; changing it changes the rewrites")

    @property
    def parts(self) -> Sequence[Columns]:
        """The data sets."""
        raise NotImplementedError

    def input_files(self) -> list[str]:
        files = [part.path for part in self.parts if part.local]
        files += self.decontaminate.files if self.decontaminate else []
        return [*files, *super().input_files()]


class DatasetConfig(RowsFromData, Columns):
    """Rows from a data set on the Hub, or from a local JSONL, Parquet or CSV file."""

    source: Literal["dataset"]
    rows: int | None = Field(default=None, ge=2, description="how many rows to keep; null: all")

    @property
    def parts(self) -> Sequence[Columns]:
        return [self]


class DatasetsConfig(RowsFromData):
    """Rows from several data sets, each with its weight."""

    source: Literal["datasets"]
    sets: list[WeightedSet] = Field(min_length=1, description="the data sets, each with its columns and weight")
    rows: int = Field(ge=2, description="how many rows to keep, over all data sets")
    shuffle: bool = Field(default=True, description="read each data set in random order, seeded by the recipe's seed")

    @property
    def parts(self) -> Sequence[Columns]:
        return self.sets


WrittenConfig = MagpieConfig | TextsConfig | DatasetConfig | DatasetsConfig
DataConfig = Annotated[WrittenConfig | ProseConfig | DrillsConfig, Field(discriminator="source")]
