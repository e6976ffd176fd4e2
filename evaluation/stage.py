"""The evaluate stage: the same measurements for the base, every model made from it, and every artifact."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from ..core.errors import UserError
from ..core.files import check_file_exists, read_json, write_json
from ..core.memory import give_back_memory
from ..core.stage import WORK, Context, Inputs
from ..data.chat import Encoded
from ..modeling.blocks import depths, drop_blocks
from ..modeling.load import load_config, load_model, load_tokenizer
from ..modeling.retaining import has_heads
from ..modeling.types import CausalModel
from ..records.bundle import BundleManifest
from ..records.figures import EvaluateFigures
from ..records.importance import Importance
from ..records.merge import MergeRecord
from ..records.models import ModelEntry, Models, RetrievalResult
from ..records.students import Variants
from ..runtime.artifact_sizes import target_of
from ..runtime.bundle import is_bundle
from ..runtime.measure import measure
from ..runtime.open import open_engine
from .config import EvaluateConfig
from .language import BaseLogProbs, log_probs, measure_base, measure_engine, measure_model, targets, text_windows
from .retrieval import Retrieval, summarised
from .retrieval import check as check_retrieval
from .rivals import Rivals, in_order, rivals_of, rows_of, with_standings
from .speed import torch_speed
from .subjects import Subject
from .suite import EnginePlayer, MeasuredModel, Suite, TorchPlayer, question_scores, side_by_side, write_answers

TOP_K = 128  # most probable tokens that llama.cpp returns for the KL


def check(config: EvaluateConfig, base: Path, context: Context) -> None:
    """Reject missing texts, broken or unknown tasks and unavailable data, before any work is done."""
    if config.text:
        check_file_exists(context.resolve(config.text), "evaluate.text: ")
    if config.tasks:
        Suite(config, context, load_tokenizer(base))
    if config.retrieval:
        check_retrieval(config.retrieval, context, load_tokenizer(base))


def run(config: EvaluateConfig, inputs: Inputs, out_dir: Path, context: Context) -> dict[str, Any]:
    """Write `models.json`, an entry per model and artifact, and `answers.jsonl`, every question's score.

    A resumed run keeps the entries it had measured.
    """
    work = out_dir / WORK
    work.mkdir(exist_ok=True)
    models = retrieving(config, checkpoints(inputs, context))
    files = artifacts(inputs) if config.artifacts else []
    bench = Bench(config, context, inputs.base, inputs.stages.get("data"), work)
    rivals = rivals_of(inputs.stages["export"] / "bundle", files, inputs, bench) if files else None
    measured, entries = measure_all(bench, [*models, *files], rivals)
    write_answers(question_scores(measured), out_dir / "answers.jsonl")
    Models(entries).write(out_dir)
    text = config.text or "held-out self-data"
    return EvaluateFigures(models=len(measured), tokens=bench.tokens, text=text).model_dump()


def measure_all(
    bench: Bench, subjects: Sequence[Subject], rivals: Rivals | None
) -> tuple[list[MeasuredModel], list[ModelEntry]]:
    """All models, artifacts and rivals measured, each artifact before its rivals, and the report's entries of them."""
    measured = [bench.measured(subject) for subject in subjects]
    if rivals is None:
        return measured, side_by_side(measured)
    pairs = rivals.measure(bench, measured)
    measured = in_order(measured, pairs)
    spans = [len(targets(row)) for row in bench.rows]
    return measured, with_standings(side_by_side(measured), pairs, spans)


def checkpoints(inputs: Inputs, context: Context) -> list[Subject]:
    """base, pruned, healed, recovered, merged, and the depths of a sorted model, as far as the run has them."""

    def loader(folder: Path) -> Callable[[], Any]:
        return lambda: load_model(folder, context.dtype, context.device)

    base_blocks = load_config(inputs.base).num_hidden_layers
    found = [Subject("base", loader(inputs.base), inputs.base, base_blocks)]
    if "prune" in inputs.stages:
        record = Importance.read(inputs.stages["prune"])
        kept = base_blocks - len(record.dropped)

        def pruned() -> Any:
            model = load_model(inputs.base, context.dtype, context.device)
            drop_blocks(model, record.dropped)
            return model

        found.append(Subject("pruned", pruned, None, kept))
        if record.healing:
            folder = inputs.stages["prune"] / "model"
            found.append(Subject("healed", loader(folder), folder, kept))
    if "distill" in inputs.stages:
        folder = inputs.stages["distill"] / "model"
        found.append(Subject("recovered", loader(folder), folder, load_config(folder).num_hidden_layers))
    if "merge" in inputs.stages and not _kept_recovered(inputs):
        folder = inputs.stages["merge"] / "model"
        found.append(Subject("merged", loader(folder), folder, load_config(folder).num_hidden_layers))
    if "sort" in inputs.stages:
        found += depth_subjects(inputs.stages["sort"] / "model", context)
    if "retain" in inputs.stages:  # its heads belong to the last model, at each of its depths
        last = "depth-" if "sort" in inputs.stages else found[-1].role
        heads = inputs.stages["retain"] / "model"
        found = [replace(subject, heads=heads) if subject.role.startswith(last) else subject for subject in found]
    return found


def retrieving(config: EvaluateConfig, subjects: list[Subject]) -> list[Subject]:
    """The checkpoints, with retrieval enabled on those that have heads, or on all if none has. Raises `UserError` if a
    policy needs heads and there are none."""
    if config.retrieval is None:
        return subjects
    headed = any(subject.heads is not None for subject in subjects)
    if config.retrieval.needs_heads and not headed:
        raise UserError(
            "evaluate.retrieval.policies has retaining, but no checkpoint has retaining heads: add a `retain` section "
            "to train them, or choose other policies"
        )
    return [replace(subject, retrieves=subject.heads is not None or not headed) for subject in subjects]


def depth_subjects(folder: Path, context: Context) -> list[Subject]:
    """A sorted checkpoint at each of its depths: `depth-12` is the first 12 blocks with the norm and head."""

    def cut(depth: int) -> Callable[[], Any]:
        def load() -> Any:
            model = load_model(folder, context.dtype, context.device)
            drop_blocks(model, range(depth, model.config.num_hidden_layers))
            return model

        return load

    return [Subject(f"depth-{depth}", cut(depth), None, depth) for depth in depths(load_config(folder))]


def _kept_recovered(inputs: Inputs) -> bool:
    """Whether the merge kept the recovered model, which is then not measured again."""
    return MergeRecord.read(inputs.stages["merge"]).chosen == Variants.read(inputs.stages["distill"]).chosen


def artifacts(inputs: Inputs) -> list[Subject]:
    """The exported files of the bundle."""
    if "export" not in inputs.stages:
        return []
    return bundle_subjects(inputs.stages["export"] / "bundle")


def bundle_subjects(bundle: Path) -> list[Subject]:
    """The artifacts that a bundle's manifest lists."""
    return [
        Subject(
            entry.role,
            None,
            bundle / entry.path,
            entry.depth,
            entry.parameters,
            entry.bits_per_weight,
            entry.bytes,
            target_of(entry.type) is not None,
        )
        for entry in BundleManifest.read(bundle).artifacts
    ]


class Bench:
    """Measures subjects on one set of windows and tasks."""

    def __init__(self, config: EvaluateConfig, context: Context, base: Path, data: Path | None, work: Path):
        self.config, self.context, self.work = config, context, work
        self.tokenizer = load_tokenizer(base)
        text = context.resolve(config.text) if config.text else None
        self.rows: list[Encoded] = text_windows(self.tokenizer, text, data, config.window, config.tokens)
        positions = sum(len(targets(row)) for row in self.rows)
        self.tokens = positions
        self.base = BaseLogProbs(work / "base.float16", positions, load_config(base).vocab_size)
        self.suite = Suite(config, context, self.tokenizer)
        self.retrieval = Retrieval(config.retrieval, context, self.tokenizer) if config.retrieval else None

    @property
    def longest(self) -> int:
        """Tokens of the longest text that an artifact is given."""
        return max([len(row.input_ids) for row in self.rows] + [self.suite.longest()])

    def measured(self, subject: Subject) -> MeasuredModel:
        """All figures of one subject, kept in the working folder once measured."""
        known = self.kept(subject.role)
        if known is not None:
            return known
        found = self._torch(subject) if subject.load is not None else self._artifact(subject)
        write_json(self._record(subject.role), found.model_dump(exclude_unset=True))
        give_back_memory()
        self.context.progress.note(f"{subject.role}: perplexity {found.perplexity:.2f}")
        return found

    def kept(self, role: str) -> MeasuredModel | None:
        """What was measured of a subject before, by this attempt or one that was killed."""
        record = self._record(role)
        return MeasuredModel.model_validate(read_json(record)) if record.exists() else None

    def _record(self, role: str) -> Path:
        return self.work / f"{role}.json"

    def _torch(self, subject: Subject) -> MeasuredModel:
        assert subject.load is not None
        with peak_memory() as peak:
            model = subject.load()
            total = sum(len(row.input_ids) for row in self.rows)
            with self.context.progress.bar(subject.role, total) as advance:
                if subject.role == "base":
                    if not self.base.complete:
                        self.base.write(log_probs(model, self.rows, advance))
                    language = measure_base(self.base, self.rows)
                else:
                    language = measure_model(model, self.rows, self.base if self.base.complete else None, advance)
            tasks = self.suite.run(subject.role, TorchPlayer(model, self.tokenizer))
            speed = torch_speed(model, self.config.speed) if self.config.speed else {}
        found = self._retrieval(model, subject)
        parameters = sum(p.numel() for p in model.parameters())
        size = parameters * next(model.parameters()).element_size()
        return MeasuredModel(
            role=subject.role,
            runtime="torch",
            blocks=subject.blocks,
            parameters=parameters,
            bytes=size,
            bits_per_weight=8 * size / parameters,
            **language,
            positions=self.tokens,
            tokens_per_second=speed.get("tokens_per_second"),
            prefill_tokens_per_second=speed.get("prefill_tokens_per_second"),
            peak_memory_bytes=peak[0],
            tasks=tasks,
            retrieval=found,
        )

    def _retrieval(self, model: CausalModel, subject: Subject) -> list[RetrievalResult]:
        if self.retrieval is None or not subject.retrieves:
            return []
        file = self.work / f"{subject.role}.retrieval.json"
        with self.context.progress.bar(f"{subject.role} long prompts", len(self.retrieval.names())) as advance:
            return summarised(self.retrieval.collect(model, subject.heads, file, advance))

    def _artifact(self, subject: Subject) -> MeasuredModel:
        assert subject.files is not None
        gguf = subject.format == "gguf"
        reference = self.base if self.base.complete else None
        with open_engine(subject.files, context=self.longest + 1, place=self.context.place) as engine:
            with self.context.progress.bar(subject.role, self.tokens) as advance:
                totals = measure_engine(engine, self.rows, reference, TOP_K if gguf else None, advance)
            tasks = self.suite.run(subject.role, EnginePlayer(engine, self.tokenizer))
            runtime = engine.runtime
        timed = None
        if self.config.speed:
            test = self.config.speed
            runtime_name = None if gguf else "onnxruntime-genai"  # has its own decoding loop
            timed = measure(
                subject.files,
                prompt_tokens=test.prompt_tokens,
                new_tokens=test.new_tokens,
                repeat=test.repeat,
                runtime=runtime_name,
                place=self.context.place,
            )
        return MeasuredModel(
            role=subject.role,
            runtime=runtime,
            blocks=subject.blocks,
            parameters=subject.parameters,
            bytes=subject.bytes,
            bits_per_weight=subject.bits_per_weight,
            **totals.metrics(),
            positions=self.tokens,
            tokens_per_second=timed.speed.decode_tokens_per_second if timed else None,
            prefill_tokens_per_second=timed.speed.prefill_tokens_per_second if timed else None,
            peak_memory_bytes=timed.peak_memory_bytes if timed else None,
            tasks=tasks,
            kls=totals.kls,
        )


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """[bytes]: this process's peak resident memory inside the context, sampled every 20 ms."""
    peak, done, process = [0], threading.Event(), psutil.Process()

    def watch() -> None:
        while True:
            peak[0] = max(peak[0], process.memory_info().rss)
            if done.wait(0.02):
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def evaluate_path(
    path: Path, config: EvaluateConfig, context: Context, base: Path | None, work: Path, rows: Path | None = None
) -> list[ModelEntry]:
    """Measure a checkpoint folder (at each of its depths), or every artifact of a bundle and its rivals; compared with
    `base` if given. Perplexity is measured on the section's text, or on the held-out rows of the data stage `rows`."""
    reference = base or path
    bench = Bench(config, context, reference, rows, work)
    subjects, rivals = [], None
    if base is not None:
        blocks = load_config(base).num_hidden_layers
        subjects.append(Subject("base", lambda: load_model(base, context.dtype, context.device), base, blocks))
    if is_bundle(path):
        files = bundle_subjects(path)
        subjects += files
        if base is not None:
            data = rows or rows_of(path)
            rivals = rivals_of(path, files, Inputs(base, base, {} if data is None else {"data": data}), bench)
    else:
        blocks = load_config(path).num_hidden_layers
        models = [Subject("model", lambda: load_model(path, context.dtype, context.device), path, blocks)]
        if len(depths(load_config(path))) > 1:
            models = depth_subjects(path, context)
        heads = path if has_heads(path) else None
        subjects = retrieving(config, [*subjects, *(replace(model, heads=heads) for model in models)])
    return measure_all(bench, subjects, rivals)[1]
