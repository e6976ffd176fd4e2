"""What the stages measure and count: the `metrics` of their manifests, a record for each stage."""

from __future__ import annotations

from pydantic import Field

from .bundle import ArtifactEntry, FamilyEntry
from .importance import Healing
from .merge import Merged
from .record import Entry, SparseEntry
from .students import LocalFigures, StudentFigures


class RewriteShares(Entry):
    """What became of the gold answers that the recipe has rewritten."""

    asked: int = Field(description="gold answers that were to be rewritten")
    origins: dict[str, int] = Field(description="gold, own or rewritten → rows")
    taken_share: float = Field(description="share of gold answers that were replaced")
    gold_kept: dict[str, int] = Field(description="reason → rows")


class SourceShare(Entry):
    """What one source of several has in the rows."""

    rows: int = Field(description="rows of both splits")
    learned: int = Field(description="tokens to learn in the training rows")
    heldout: int = Field(description="tokens to measure on in the held-out rows")
    share: float = Field(description="share of all tokens to learn")


class ProseFigures(Entry):
    """Real text among the rows."""

    train_documents: int = Field(description="documents that training rows are of")
    heldout_documents: int = Field(description="other documents, that held-out rows are of")
    dropped: dict[str, int] = Field(description="reason → documents")
    bytes_per_token: float = Field(description="UTF-8 bytes of text per token")


class DataFigures(SparseEntry):
    """The data stage's; `stats.json` holds the same without the speed."""

    rows: int = Field(description="rows of both splits")
    train: int = Field(description="rows to train on")
    heldout: int = Field(description="rows held out of training")
    seen: int = Field(description="rows read or sampled")
    dropped: dict[str, int] = Field(description="reason → rows")
    cut: int = Field(description="rows whose last answer was cut off")
    kept_share: float = Field(description="share of the rows read or sampled that was kept")
    tokens: int = Field(description="tokens of all rows")
    targets: int = Field(description="tokens to train on")
    contaminated: dict[str, int] = Field(default_factory=dict, description="evaluation file → rows dropped for it")
    sets: dict[str, int] = Field(default_factory=dict, description="data set → rows")
    prose: ProseFigures | None = Field(default=None, description="the real text among the rows")
    shares: dict[str, SourceShare] = Field(
        default_factory=dict, description="with real text or drills beside other rows: every source"
    )
    rewritten: RewriteShares | None = Field(default=None, description="what became of the gold answers")
    teacher_targets: int | None = Field(default=None, description="response tokens with stored distributions")
    teacher_bytes: int | None = Field(default=None, description="size of the stored distributions")
    tokens_per_second: float | None = Field(
        default=None, description="tokens sampled per second, since the last interruption"
    )


class PruneFigures(Entry):
    """The prune stage's."""

    blocks: int  # of the unpruned model
    dropped: list[int]
    tokens: int  # of the calibration rows
    healing: list[Healing]


class DistillFigures(StudentFigures):
    """The distill stage's: those of the chosen student, and of each of several."""

    chosen: str | None = None
    variants: dict[str, StudentFigures] = Field(default_factory=dict)
    local: list[LocalFigures] = Field(default_factory=list)


class SortedDepths(Entry):
    """What a model can run at."""

    depths: list[int]


class SortFigures(StudentFigures, SortedDepths):
    """The sort stage's."""


class HeadFigures(Entry):
    """Retaining heads on held-out rows."""

    eval_loss: float
    eval_recall: float  # of the quarter of a prompt that answers attend to most, the share that is kept


class RetainFigures(Entry):
    """The retain stage's."""

    rows: int
    steps: int
    width: int
    trainable_parameters: int
    before: HeadFigures
    after: HeadFigures
    seconds_training: float


class MergeFigures(Entry):
    """The merge stage's."""

    method: str
    chosen: str
    models: list[Merged]


class ExportFigures(Entry):
    """The export stage's: what the bundle's manifest lists."""

    artifacts: list[ArtifactEntry]
    families: list[FamilyEntry]


class EvaluateFigures(Entry):
    """The evaluate stage's."""

    models: int
    tokens: int  # that perplexity is measured on
    text: str  # what they are of
