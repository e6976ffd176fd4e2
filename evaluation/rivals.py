"""The rivals of exported files: which are measured, and what they say of the files that they stand beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.stage import Inputs
from ..export.cost import RIVAL_SHARED
from ..modeling.load import load_config
from ..records.bundle import BundleManifest
from ..records.models import ArtifactFormat, ModelEntry
from ..runtime.artifact_sizes import target_of
from .front import RivalPair, judge
from .subjects import Subject
from .suite import MeasuredModel

if TYPE_CHECKING:
    from ..export.rivals import UnprunedModels
    from .stage import Bench

RIVALS = "rivals"  # in the stage's working folder: the files, while they are needed
TRAINS = {"distill", "merge", "sort"}  # stages after which a model of all blocks is another one
PLACES = {"gguf": "GGUF", "onnx": "ONNX"}


def role_of(form: ArtifactFormat, kind: str) -> str:
    """The role of the unpruned model in a type, or of a size."""
    return f"base-{form}-{kind}"


def rivals_of(bundle: Path, files: Sequence[Subject], inputs: Inputs, bench: Bench) -> Rivals | None:
    """The rivals that are to be measured beside a bundle's files; None where the section wants none.

    `inputs` has the unpruned model, and the data stage that an importance matrix comes from. `UserError` where the
    disk is too small for them: before anything is measured.
    """
    manifest = BundleManifest.read(bundle)
    cut = manifest.depths[0] < load_config(inputs.base).num_hidden_layers
    trained = not TRAINS.isdisjoint(manifest.provenance.get("stages", {}))
    if not bench.config.wants_rivals(cut or trained):
        return None
    from ..export.rivals import UnprunedModels, imatrix_tokens

    tokens = imatrix_tokens(bundle) if "data" in inputs.stages else 0
    if manifest.importance_matrix and not tokens:
        bench.context.progress.note(
            "the bundle's files were rounded with an importance matrix; without its rows the rivals have none"
        )
    unpruned = UnprunedModels(inputs, bench.work / RIVALS, bench.context, tokens)
    wanted: list[tuple[Subject, ArtifactFormat]] = []
    formats: dict[ArtifactFormat, str | None] = {}
    for file in files:
        # In the artifact's own runtime; an ONNX folder also stands beside the GGUF that somebody could take instead.
        for form in dict.fromkeys((file.format, "gguf")):
            if form not in formats:
                formats[form] = unpruned.problem(form, bench.longest)
            if formats[form] is None:
                wanted.append((file, form))
    for form, problem in formats.items():
        if problem is not None:
            bench.context.progress.note(f"no rival in {PLACES[form]}: {problem}")
    unpruned.check_disk((form, file.bytes, file.sized) for file, form in wanted)
    return Rivals(unpruned, wanted)


def rows_of(bundle: Path) -> Path | None:
    """The data stage of the run that a bundle still lies in, if it does."""
    stages = BundleManifest.read(bundle).provenance.get("stages", {})
    folder = bundle.parent.parent / f"data-{stages['data']}" if "data" in stages else None
    return folder if folder is not None and (folder / "rows.parquet").is_file() else None


class Rivals:
    """The rivals of a bundle's files, made one by one and deleted when they were measured."""

    def __init__(self, unpruned: UnprunedModels, wanted: Sequence[tuple[Subject, ArtifactFormat]]):
        self.unpruned, self.wanted = unpruned, wanted

    def measure(self, bench: Bench, measured: Sequence[MeasuredModel]) -> list[RivalPair]:
        """Every file beside its rival of each format. A resumed run keeps what it had measured."""
        by_role = {model.role: model for model in measured}
        known: dict[tuple[ArtifactFormat, str], MeasuredModel] = {}
        pairs: dict[tuple[str, ArtifactFormat], RivalPair] = {}
        for file, form in sorted(self.wanted, key=lambda wanted: wanted[0].bytes):
            kind, ours = self._kind(file, form, known), by_role[file.role]
            if kind is None:
                smallest, size = next(iter(self.unpruned.sizes(form).items()))
                least = self.unpruned.smallest if form == "gguf" else None
                pairs[file.role, form] = RivalPair(ours, form, None, smallest, size, least)
                continue
            if (form, kind) not in known:
                known[form, kind] = self._measured(bench, role_of(form, kind), form, kind)
            rival = known[form, kind]
            pairs[file.role, form] = RivalPair(ours, form, rival, kind, rival.bytes)
        self.unpruned.close()
        return [pairs[file.role, form] for file, form in self.wanted]

    def _kind(
        self, file: Subject, form: ArtifactFormat, known: Mapping[tuple[ArtifactFormat, str], MeasuredModel]
    ) -> str | None:
        """The best of at most the file's bytes: one that was chosen for a hardly smaller file is that, too."""
        limit, sized = file.bytes, self.unpruned.per_tensor(form, file.bytes, file.sized)
        shared = {
            kind: rival.bytes
            for (its, kind), rival in known.items()
            if its == form and (target_of(kind) is not None or not sized)
            if (1 - RIVAL_SHARED) * limit <= rival.bytes <= limit
        }
        return max(shared, key=lambda kind: shared[kind]) if shared else self.unpruned.best(form, limit, file.sized)

    def _measured(self, bench: Bench, role: str, form: ArtifactFormat, kind: str) -> MeasuredModel:
        found = bench.kept(role)
        if found is None:
            path, size = self.unpruned.file(form, kind)
            bits = round(size.bits_per_weight, 4)
            found = bench.measured(
                Subject(role, None, path, self.unpruned.blocks, size.parameters, bits, size.bytes),
            )
        self.unpruned.discard(form, kind)
        return found


def in_order(measured: Sequence[MeasuredModel], pairs: Sequence[RivalPair]) -> list[MeasuredModel]:
    """The models, each rival once, behind the first artifact that it stands beside."""
    found: dict[str, MeasuredModel] = {}
    for model in measured:
        found[model.role] = model
        for pair in pairs:
            if pair.rival is not None and pair.artifact.role == model.role:
                found.setdefault(pair.rival.role, pair.rival)
    return list(found.values())


def with_standings(entries: Sequence[ModelEntry], pairs: Sequence[RivalPair], spans: Sequence[int]) -> list[ModelEntry]:
    """The entries, artifacts with their standings and rivals with the artifacts that they stand beside; `spans` are the
    positions measured in each window."""
    found = []
    for entry in entries:
        standings = [judge(pair, spans) for pair in pairs if pair.artifact.role == entry.role]
        beside = [p.artifact.role for p in pairs if p.rival is not None and p.rival.role == entry.role]
        given = {"standings": standings, "rival_of": beside}
        found.append(entry.model_copy(update={key: value for key, value in given.items() if value}))
    return found
