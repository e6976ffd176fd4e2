"""The recipe's `data` section."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from ..core.stage import Section

FORMAT = 3
SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
Check = Literal["none", "number", "choice", "exact", "python"]


def _named(value: Any) -> Any:
    """`rewrite: maths` is short for `rewrite: {kind: maths}`."""
    return {"kind": value} if isinstance(value, str) else value


class TeacherConfig(Section):
    """The unpruned model's likeliest next tokens at every token that is learned, for `distill.teacher: cached`."""

    top_k: int = Field(64, ge=1, description="tokens kept with their log-probabilities; all others are one bucket")
    batch: int = Field(1, ge=1, description="packed sequences of `length` tokens per forward pass")


class TransformersEngine(Section):
    """PyTorch; the only engine whose rows are the same bytes again on the same machine."""

    kind: Literal["transformers"] = "transformers"


class LlamaCppEngine(Section):
    """llama.cpp on a quantized GGUF file of the unpruned model: a fraction of the memory, for large models on CPUs."""

    kind: Literal["llama.cpp"] = "llama.cpp"
    gguf: str = Field(min_length=1, description="a GGUF file of the unpruned model, of any type of weights")
    threads: int = Field(0, ge=0, description="0: one per core")


class VllmEngine(Section):
    """vLLM, on a GPU or, where the build for CPUs is installed, on a CPU; an optional package."""

    kind: Literal["vllm"] = "vllm"
    memory: float = Field(default=0.9, gt=0, le=1, description="share of a GPU's memory that vLLM may take")
    gpus: int = Field(default=1, ge=1, description="GPUs that hold the model together, each a part of every block")


EngineConfig = TransformersEngine | LlamaCppEngine | VllmEngine
Engine = Annotated[EngineConfig, Field(discriminator="kind"), BeforeValidator(_named)]


class _Source(Section):
    """What every source has."""

    engine: Engine = Field(
        default_factory=TransformersEngine, description="what writes text: transformers, llama.cpp or vllm"
    )
    teacher: TeacherConfig | None = Field(None, description="write the unpruned model's likeliest tokens down too")

    def input_files(self) -> list[str]:
        return [self.engine.gguf] if isinstance(self.engine, LlamaCppEngine) else []


class MagpieConfig(_Source):
    """Self-data without any data set: the unpruned model writes prompts and answers (Magpie, arXiv 2406.08464)."""

    source: Literal["magpie"]
    rows: int = Field(96, ge=2, description="how many rows to keep")
    heldout: float = Field(0.125, gt=0, lt=1, description="share of the rows kept out of training, at least one row")
    batch: int = Field(32, ge=1, description="rows sampled together; a different number draws different rows")
    max_prompt_tokens: int = Field(64, ge=1, description="prompts that have not ended by then are dropped")
    max_tokens: int = Field(192, ge=1, description="answers are cut off there, see `unfinished`")
    unfinished: Literal["drop", "keep"] = Field(
        "drop", description="answers cut off at max_tokens: dropped, or kept without learning where they end"
    )
    length: int = Field(512, ge=8, description="rows longer than this, in tokens with the chat template, are dropped")
    temperature: float = Field(1.0, ge=0, description="for prompts: 1 draws from the model as it is, for variety")
    top_p: float = Field(0.9, gt=0, le=1, description="for prompts: draw only from the likeliest tokens of this mass")
    top_k: int = Field(0, ge=0, description="for prompts and answers: draw from the k likeliest tokens; 0: from all")
    answer_temperature: float = Field(0.6, ge=0, description="for answers: 0 takes the likeliest token every time")
    answer_top_p: float = Field(0.95, gt=0, le=1, description="for answers, as top_p")
    topics: list[str] = Field([], description="what prompts are about, in turn; empty: whatever the model thinks of")
    max_attempts: float = Field(4.0, ge=1, description="give up after drawing this many times `rows` prompts")


class TextsConfig(_Source):
    """Plain text the unpruned model writes from random first tokens (LLM-QAT, arXiv 2305.17888): for calibration, and
    for models without a chat template."""

    source: Literal["texts"]
    rows: int = Field(128, ge=2, description="how many texts to keep")
    heldout: float = Field(0.125, gt=0, lt=1, description="share of the rows kept out of training, at least one row")
    batch: int = Field(64, ge=1, description="rows sampled together; a different number draws different rows")
    tokens: int = Field(256, ge=8, description="texts that have not ended by then are cut off there")
    openings: list[Annotated[str, Field(min_length=1)]] = Field(
        [], description="what texts begin with, in turn: words of your domain; empty: one random token each"
    )
    length: int = Field(512, ge=8, description="longer texts are cut into windows of so many tokens")
    temperature: float = Field(1.0, ge=0, description="1 draws from the model as it is")
    top_p: float = Field(0.95, gt=0, le=1, description="draw only from the likeliest tokens of this mass")
    top_k: int = Field(0, ge=0, description="draw from the k likeliest tokens; 0: from all")
    max_attempts: float = Field(4.0, ge=1, description="give up after drawing this many times `rows` texts")


class General(Section):
    """The unpruned model answers in its own words, the gold answer as its guide (arXiv 2402.13669, 2410.09982)."""

    kind: Literal["general"] = "general"
    check: Check = Field(
        "none", description="what a rewrite has to agree with gold in: its final number, choice letter, text, or tests"
    )
    marker: str | None = Field(
        None,
        min_length=1,
        description="the final answer follows these words, such as 'Answer:' (default: docs/explanation/self-data.md)",
    )
    own_answer_first: bool = Field(
        False, description="before gold is shown, let the model answer; taken where the check agrees (arXiv 2502.08130)"
    )
    max_tokens: int = Field(256, ge=1, description="rewrites that have not ended by then are not taken")
    temperature: float = Field(0.6, ge=0, description="0 takes the likeliest token every time")
    top_p: float = Field(0.95, gt=0, le=1, description="draw only from the likeliest tokens of this mass")
    top_k: int = Field(0, ge=0, description="draw from the k likeliest tokens; 0: from all")
    timeout: float = Field(5.0, gt=0, le=600, description="seconds that the tests of one row may take (check: python)")
    memory: int = Field(512, ge=64, description="megabytes of memory that they may take")

    @model_validator(mode="after")
    def _own_answers_need_a_check(self) -> Self:
        if self.own_answer_first and self.check == "none":
            raise ValueError("own_answer_first needs a check: without one nothing says that the answer is right")
        return self


class Maths(General):
    """As general, but the model is asked as an expert in mathematics, step by step, and its turn is opened for it."""

    kind: Literal["maths"] = "maths"  # type: ignore[assignment]
    check: Check = Field("number", description="what a rewrite has to agree with gold in, as in general")


Rewrite = Annotated[General | Maths, Field(discriminator="kind"), BeforeValidator(_named)]


class Decontaminate(Section):
    """Drop rows that share words with evaluation files."""

    files: list[str] = Field(min_length=1, description="evaluation files, .jsonl or .txt; all texts in them count")
    ngram: int = Field(13, ge=2, description="so many words in a row; shorter texts are compared as a whole")


class Columns(Section):
    """Where rows come from, and which columns they are read from."""

    path: str = Field(min_length=1, description="a .jsonl, .json, .parquet or .csv file, or a data set's Hub name")
    subset: str | None = Field(None, description="the Hub data set's configuration, if it has several")
    split: str = Field("train", description="the Hub data set's split")
    prompt: str | None = Field(
        None, description="column of the user's words, or of messages up to the answer (default: prompt)"
    )
    context: str | None = Field(None, description="column of a text that follows the prompt, where there is one")
    response: str | None = Field(
        None, description="column of the answer to learn, a text or messages (default: response)"
    )
    messages: str | None = Field(
        None, description="column of whole conversations: lists of {role, content}, or of {from, value}"
    )
    tools: str | None = Field(
        None, description="column of the tools a conversation is given (default: tools, where the data set has it)"
    )
    text: str | None = Field(None, description="column of plain text, used without a chat template")
    answer: str | None = Field(None, description="column of the final answer, where a check is not to read it off gold")
    tests: str | None = Field(None, description="column of Python tests, for check: python")
    rewrite: Rewrite | None = Field(
        None, description="general or maths: the unpruned model rewrites the last answer; null: gold as it is"
    )

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        pair = (self.prompt, self.context, self.response) != (None, None, None)
        if pair + (self.messages is not None) + (self.text is not None) > 1:
            raise ValueError("give either prompt and response, or messages, or text: a row is one of them")
        if self.tools is not None and self.text is not None:
            raise ValueError("plain text has no tools: give prompt and response, or messages")
        if self.rewrite is not None and self.text is not None:
            raise ValueError("plain text has no answer that could be rewritten: give prompt and response, or messages")
        if self.rewrite is not None and self.rewrite.check == "python" and self.tests is None:
            raise ValueError("check: python needs the column of the tests under tests")
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
            found: dict[str, str | None] = {"messages": self.messages}
        elif self.text is not None:
            found = {"text": self.text}
        else:
            found = {"prompt": self.prompt or "prompt", "response": self.response or "response"}
        found |= {"context": self.context, "tools": self.tools, "answer": self.answer, "tests": self.tests}
        return {key: column for key, column in found.items() if column is not None}


class WeightedSet(Columns):
    """One data set of several."""

    weight: float = Field(1.0, gt=0, description="its share of the rows, as a share of all weights")


class RowsFromData(_Source):
    """What holds for rows of one data set and of several."""

    shuffle: bool = Field(False, description="take the rows in a random order, seeded by the recipe's seed")
    heldout: float = Field(0.125, gt=0, lt=1, description="share of the rows kept out of training, at least one row")
    length: int = Field(
        512, ge=8, description="conversations longer than this, in tokens, are dropped; text is cut into windows"
    )
    max_dropped: float = Field(
        0.2,
        ge=0,
        le=1,
        description="share of a data set's rows that may be unusable before the stage stops; duplicates and what "
        "decontaminate drops are not counted",
    )
    decontaminate: Decontaminate | None = Field(None, description="drop rows that evaluation files have, too")
    batch: int = Field(32, ge=1, description="rows rewritten together; a different number draws different rows")

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
    rows: int | None = Field(None, ge=2, description="how many rows to keep; null: all")

    @property
    def parts(self) -> Sequence[Columns]:
        return [self]


class DatasetsConfig(RowsFromData):
    """Rows from several data sets, each with its weight."""

    source: Literal["datasets"]
    sets: list[WeightedSet] = Field(min_length=1, description="the data sets, each with its columns and weight")
    rows: int = Field(ge=2, description="how many rows to keep of all sets together")
    shuffle: bool = Field(True, description="take each set's rows in a random order, seeded by the recipe's seed")

    @property
    def parts(self) -> Sequence[Columns]:
        return self.sets


DataConfig = Annotated[MagpieConfig | TextsConfig | DatasetConfig | DatasetsConfig, Field(discriminator="source")]
