"""Keys shared by the recipe's `distill` and `sort` sections: objective, tuned weights, teacher, optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from ..core.registry import named
from ..core.stage import Section
from ..runtime.artifact_types import NEAREST
from .objectives import OBJECTIVES
from .objectives.asft import Asft

RANK = 16  # of adapters for few tokens
BY_TOKENS = "null: by the number of tokens to learn (docs/explanation/objectives.md)"


if TYPE_CHECKING:
    RoundedType = str
else:
    RoundedType = Literal[NEAREST]


class Lora(Section):
    """Low-rank adapters, merged into the weights at the end."""

    kind: Literal["lora"] = "lora"
    rank: int | None = Field(default=None, ge=1, description=BY_TOKENS)
    alpha: float = Field(default=32.0, gt=0, description="the adapters' output is scaled by alpha / rank")
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: Annotated[list[str], Field(min_length=1)] | Literal["all-linear"] = Field(
        default="all-linear",
        description="names of the linear layers to adapt, such as [q_proj, v_proj]; never the head",
    )
    quantize_base: Literal["nf4"] | None = Field(
        default=None,
        description="hold the frozen weights in 4 bits while training (QLoRA); the merge uses the full ones",
    )
    quantize_as: RoundedType | None = Field(
        default=None,
        description="train through the weights that the export rounds to this type, such as Q4_K_M or int4",
    )
    quantize_after: float = Field(
        default=0.75, ge=0, lt=1, description="share of the steps before quantize_as, made with weights as they are"
    )
    train_norm: bool = Field(default=False, description="train the final norm too")
    train_head: bool = Field(default=False, description="train the head too; with tied weights, also the embedding")

    @model_validator(mode="after")
    def _rounds_alone(self) -> Self:
        for key, given, why in (
            ("quantize_base", self.quantize_base, "holds the same weights in another type"),
            ("dropout", self.dropout, "drops inputs of the adapters, which quantize_as adds to the weights"),
            ("train_head", self.train_head, "trains the head in float32, which quantize_as holds rounded"),
        ):
            if self.quantize_as and given:
                raise ValueError(f"quantize_as: {self.quantize_as} does not go with {key}, which {why}; leave one out")
        return self


class Full(Section):
    """All weights are trained."""

    kind: Literal["full"] = "full"


class Copy(Section):
    """A frozen copy of the unpruned model runs beside the student."""

    kind: Literal["copy"] = "copy"
    quantize: Literal["nf4", "int8"] | None = Field(default=None, description="quantize the copy (bitsandbytes)")


class Shared(Section):
    """Teacher and student share one set of weights: the teacher runs all blocks with the adapters off (LoRA only)."""

    kind: Literal["shared"] = "shared"


class Cached(Section):
    """The teacher's most likely tokens, stored by the data stage; see `data.teacher`."""

    kind: Literal["cached"] = "cached"


class OnPolicy(Section):
    """The student writes the answers of some training rows itself, and the unpruned model says at every token what it
    would have written (GKD, arXiv 2306.13649)."""

    share: float = Field(
        default=0.5, gt=0, le=1, description="share of the training rows whose last answer the student writes"
    )
    max_tokens: int = Field(default=64, ge=1, description="maximum tokens of a written answer")
    temperature: float = Field(default=1.0, ge=0, description="sampling temperature; 0: greedy")
    refresh: int = Field(
        default=10, ge=1, description="steps for which answers are written at once, with the weights of that moment"
    )
    batch: int = Field(default=16, ge=1, description="answers written at once")


Tune = Annotated[Lora | Full, Field(discriminator="kind"), BeforeValidator(named)]
Teacher = Annotated[Copy | Shared | Cached, Field(discriminator="kind"), BeforeValidator(named)]
Schedule = Literal["cosine", "linear", "constant"]
if TYPE_CHECKING:
    from .objectives import Objective as AnyObjective
else:
    AnyObjective = OBJECTIVES.union()


class TrainingConfig(Section):
    """How a student is trained: objective, trained weights, teacher, and duration."""

    stage: ClassVar[str]  # the section's name in a recipe
    sorts: ClassVar[bool] = False  # trains several depths, which the checkpoint then records

    objective: AnyObjective = Field(default_factory=Asft, description=OBJECTIVES.listed())
    tune: Tune = Field(default_factory=Lora, description="lora or full")
    teacher: Teacher = Field(
        default_factory=Copy, description="where the teacher's distributions come from: copy, shared or cached"
    )
    learn: Literal["answers", "all"] = Field(
        default="answers",
        description="tokens of the training rows that the loss counts: those of answers, or prompts and templates too, "
        "which the unpruned model also has distributions for",
    )
    on_policy: OnPolicy | None = Field(
        default=None,
        description="the student writes a share of its rows itself, with objective kd; {} for the defaults",
    )
    epochs: float | None = Field(
        default=None, gt=0, description=f"passes over the training rows; max_steps takes precedence; {BY_TOKENS}"
    )
    max_steps: int | None = Field(default=None, ge=1, description="optimizer steps")
    lr: float | None = Field(default=None, gt=0, description=f"peak learning rate; {BY_TOKENS}")
    schedule: Schedule = "cosine"
    warmup: float = Field(default=0.1, ge=0, lt=1, description="share of the steps over which the rate rises")
    batch: int = Field(default=1, ge=1, description="packed sequences per forward pass")
    accumulate: int | None = Field(default=None, ge=1, description=f"forward passes per optimizer step; {BY_TOKENS}")
    length: int = Field(
        default=512, ge=8, description="tokens per packed sequence; without accumulate no more than a step needs"
    )
    chunk: int = Field(default=256, ge=1, description="positions whose logits are held in memory at once")
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    weight_decay: float = Field(default=0.0, ge=0, le=1)
    clip: float = Field(default=1.0, gt=0, description="gradient norm limit")
    gradient_checkpointing: bool = Field(default=False, description="recompute activations in the backward pass")
    eval_every: int | None = Field(
        default=None, ge=1, description=f"steps between measurements on the held-out rows; {BY_TOKENS}"
    )
    save_every: int = Field(default=20, ge=1, description="steps between checkpoints that a killed run resumes from")
    select: Literal["kl", "perplexity", "loss", "last"] = Field(
        default="kl", description="held-out metric that selects the checkpoint to keep; last keeps the final one"
    )

    @model_validator(mode="after")
    def _shared_needs_lora(self) -> Self:
        if isinstance(self.teacher, Shared) and any(isinstance(student.tune, Full) for student in self.students):
            raise ValueError(
                "teacher: shared needs LoRA, which leaves the model's own weights unchanged; tune: full would train "
                "the teacher's weights too: choose teacher: copy or cached"
            )
        return self

    @model_validator(mode="after")
    def _own_rows_need_a_judge(self) -> Self:
        if self.on_policy is None:
            return self
        if isinstance(self.teacher, Cached):
            raise ValueError(
                "on_policy needs the unpruned model's predictions for answers that the student has yet to write, which "
                "teacher: cached cannot have; choose teacher: copy or shared"
            )
        for student in self.students:
            if student.objective.reads_targets:
                raise ValueError(
                    f"on_policy with objective: {student.objective.kind} would teach the student its own mistakes; "
                    "choose objective: kd, with any divergence"
                )
        return self

    def misfits(self, sections: Mapping[str, Any]) -> Iterable[tuple[tuple[str | int, ...], str]]:
        reads = isinstance(self.teacher, Cached) and any(student.objective.needs_teacher for student in self.students)
        if reads and "data" in sections and sections["data"].teacher is None:
            yield (
                ("teacher",),
                "cached reads predictions that the data stage stores; add data.teacher: {top_k: 64}, or choose another "
                "teacher",
            )
        if reads and self.learn == "all":
            yield (
                ("learn",),
                "the predictions that the data stage stores are those of answers; with teacher: cached leave it out",
            )

    @property
    def students(self) -> Sequence[TrainingConfig]:
        """The section for each student; here there is one."""
        return [self]

    @property
    def passes(self) -> int:
        """Passes through the head per response token."""
        return 1

    def depth_weights(self, blocks: int) -> dict[int, float]:
        """The loss weight of each trained depth of a model with `blocks` blocks; they sum to one."""
        return {blocks: 1.0}
