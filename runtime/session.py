"""Generating text with a bundle: conversations or plain text in, pieces of text out. No torch, no transformers."""

from __future__ import annotations

from collections import Counter, abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from ..core.errors import UserError
from ..core.place import ANYWHERE, Place
from ..core.suggest import did_you_mean
from ..kv.settings import FOLDER, GGUF, KvBudget, choose_budget
from ..records.bundle import ArtifactEntry, BundleManifest
from .artifact_types import GGUF_CACHE
from .bundle import read_bundle
from .chat import ChatTemplate, Messages
from .generator import Finish, Generator, Request, RequestWork, check_depth
from .providers import check_name
from .text import StopTexts, TextStream, Tokenizer, stop_tokens

EngineName = Literal["onnx", "llama.cpp"]
FORMATS: dict[str, str] = {"onnx": "onnx", "llama.cpp": "gguf"}  # engine -> the format it opens


@dataclass(frozen=True)
class Settings:
    """Generation settings of one answer."""

    max_tokens: int = 256
    depth: int | None = None  # None: the deepest
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()  # the answer ends before the first of these texts
    draft_depth: int | None = None
    draft_tokens: int = 4
    exits: Mapping[int, float] = field(default_factory=dict)  # depth -> probability above which its token is taken

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UserError(f"max tokens must be at least 1, not {self.max_tokens}")
        if self.temperature < 0:
            raise UserError(f"temperature must be at least 0, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top p must be above 0 and at most 1, not {self.top_p}")
        if self.seed < 0:
            raise UserError(f"seed must be at least 0, not {self.seed}")


@dataclass(frozen=True)
class Usage:
    """An answer's token counts and timings."""

    prompt_tokens: int
    completion_tokens: int
    reused_tokens: int  # prompt tokens reused from the previous request
    depths: Mapping[int, int]  # depth -> how many tokens it decided
    drafted: int
    accepted: int


@dataclass(frozen=True)
class Piece:
    """The text of one more token, often none; the last piece has the finish reason and the usage."""

    text: str
    finish: Finish | None = None  # "stop": the model ended it; "length": max_tokens or the context did
    usage: Usage | None = None


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    text: str
    finish: Finish  # "stop": the model ended it, or a stop text; "length": max_tokens or the context did
    usage: Usage


Pieces = abc.Generator[Piece, None, None]


class Session:
    """A bundle in one engine and one type, at any of its depths; `context` bounds llama.cpp's cache, in tokens.

    `engine` None takes llama.cpp if the bundle has a GGUF, else onnx; `kind` None the engine's first artifact.
    Depths greater than `deepest` are not loaded. `draft` names another bundle whose deepest model drafts (onnx only).
    `depth` is used by requests that name none (default: the deepest). `kv_budget` bounds the cache, so that texts of
    any length take the same memory: the number of keys and values per block and KV head, or a `KvBudget` with more
    settings; `engine` None is then onnx. `kv_type` is how llama.cpp holds keys and values: f16, or q8_0 in about half
    the memory; `engine` None is then llama.cpp. `place` is the hardware; `device` says what it came to.

    >>> with Session("bundle", depth=18, kv_budget=1024) as session:
    ...     print(session.generate("Why is the sky blue?", max_tokens=64).text)

    Raises `UserError` for broken bundles, and for engines, types and depths that are not in it.
    """

    def __init__(
        self,
        bundle: str | Path,
        engine: str | None = None,
        kind: str | None = None,
        *,
        depth: int | None = None,
        threads: int = 0,
        context: int = 4096,
        deepest: int | None = None,
        draft: Path | None = None,
        kv_budget: int | KvBudget | None = None,
        kv_type: str | None = None,
        place: Place = ANYWHERE,
    ):
        self.path = Path(bundle)
        self.manifest = read_bundle(self.path)
        self.kv = choose_budget(self.path, kv_budget) if isinstance(kv_budget, int) else kv_budget
        self.kv_type, self.place = kv_type, place
        engine = choose_engine(engine, self.kv, kv_type, place)
        self.engine, self.kind, artifacts = self._choose(engine, kind)
        if deepest is not None:
            check_depth(deepest, tuple(artifacts))
            artifacts = {depth: entry for depth, entry in artifacts.items() if depth <= deepest}
        if depth is not None:
            check_depth(depth, tuple(artifacts))
        self.tokenizer = Tokenizer(self.path)
        self.stop = stop_tokens(self.path)
        self._generator = self._open(artifacts, threads, context, draft)
        self.depths, self.context = self._generator.depths, self._generator.context
        self.device = self._generator.device
        self.depth = self.depths[-1] if depth is None else depth

    def _choose(self, engine: str | None, kind: str | None) -> tuple[str, str, dict[int, ArtifactEntry]]:
        """(engine, type, depth → artifact): those that there are; of a server that already runs, the one it serves."""
        if not self.place.is_running:
            engine, kind = choose_artifact(self.manifest, engine, kind)
            return engine, kind, depth_artifacts(self.manifest, engine, kind)
        from .llama_server import served_artifact

        entry = served_artifact(self.manifest, self.path, kind, self.place)
        return "llama.cpp", entry.type, {entry.depth: entry}

    def _open(self, artifacts: dict[int, ArtifactEntry], threads: int, context: int, draft: Path | None) -> Generator:
        if self.kv is not None and draft is not None:
            raise UserError("a KV budget cannot be combined with a draft: evicted cache entries cannot be restored")
        if self.engine == "llama.cpp":
            from .llamacpp_generator import LlamaCppGenerator
            from .llamacpp_kv import LlamaCppKvGenerator, check_no_gpu

            if draft is not None:
                raise UserError("only the onnx engine can draft with another bundle; for llama.cpp give a draft depth")
            files = {depth: self.path / entry.path for depth, entry in artifacts.items()}
            held = self.kv_type or GGUF_CACHE
            if self.kv is not None:
                check_no_gpu(self.place)
                return LlamaCppKvGenerator(files, self.path / FOLDER / GGUF, self.kv, threads, held)
            return LlamaCppGenerator(files, threads, context, held, self.place)
        from .onnx_generator import BoundedGenerator, OnnxGenerator

        # The graph of the deepest model holds all others.
        every = depth_artifacts(self.manifest, self.engine, self.kind)
        folder = self.path / every[max(every)].path
        if self.kv is not None:
            return BoundedGenerator(folder, sorted(artifacts), self.kv, threads, self.place)
        drafter = None if draft is None else self._drafter(draft, threads)
        return OnnxGenerator(folder, sorted(artifacts), threads, drafter, self.place)

    def _drafter(self, bundle: Path, threads: int):
        from .onnx_generator import OnnxGenerator

        manifest = read_bundle(bundle)
        _, kind = choose_artifact(manifest, "onnx", None)
        artifacts = depth_artifacts(manifest, "onnx", kind)
        if (bundle / "tokenizer.json").read_bytes() != (self.path / "tokenizer.json").read_bytes():
            raise UserError(
                f"the bundles {bundle} and {self.path} have different tokenizers: one cannot draft for the other"
            )
        deepest = max(artifacts)
        return OnnxGenerator(bundle / artifacts[deepest].path, [deepest], threads, place=self.place)

    @cached_property
    def template(self) -> ChatTemplate:
        """The model's chat template; `UserError` where it has none."""
        return ChatTemplate(self.path)

    def generate(
        self,
        prompt: str | Messages,
        *,
        max_tokens: int = 256,
        depth: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        raw: bool = False,
        on_text: Callable[[str], None] | None = None,
    ) -> Answer:
        """A whole answer to a question, or to a conversation of {"role", "content"}, in the model's own template.

        With `raw` the text is continued without a template. A `temperature` of 0 is greedy. `on_text` is called with
        each piece of text as it is generated; `chat` and `complete` yield the pieces, and take all `Settings`.
        """
        settings = Settings(max_tokens, depth, temperature, top_p, seed, tuple(stop))
        if raw and isinstance(prompt, str):
            pieces = self.complete(prompt, settings)
        elif raw:
            raise UserError("raw takes plain text; a conversation needs the chat template")
        else:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            pieces = self.chat(messages, settings)
        text, last = "", Piece("")
        for last in pieces:
            text += last.text
            if on_text is not None and last.text:
                on_text(last.text)
        assert last.finish is not None and last.usage is not None  # of the last piece
        return Answer(text, last.finish, last.usage)

    def chat(
        self, messages: Messages, settings: Settings = Settings(), variables: Mapping[str, Any] | None = None
    ) -> Pieces:
        """The assistant's answer to a conversation of {"role", "content"}, in the model's own template.

        `variables` are further variables of the template.
        """
        return self._write(self.prompt(messages, variables), settings)

    def complete(self, prompt: str | Sequence[int], settings: Settings = Settings()) -> Pieces:
        """The continuation of plain text, or of tokens."""
        if isinstance(prompt, str):
            return self._write(self.tokenizer.encode(prompt, begin=True), settings)
        unknown = next((number for number in prompt if not 0 <= number < self.tokenizer.size), None)
        if unknown is not None:
            raise UserError(
                f"the prompt has token id {unknown}, but the model's ids go from 0 to {self.tokenizer.size - 1}"
            )
        return self._write(list(prompt), settings)

    def prompt(self, messages: Messages, variables: Mapping[str, Any] | None = None) -> list[int]:
        """The tokens of a conversation up to where the answer begins."""
        return self.tokenizer.encode(self.template.render(messages, variables=variables))

    def _write(self, ids: list[int], settings: Settings) -> Pieces:
        if not ids:
            raise UserError("the prompt is empty: there is nothing to continue")
        if len(ids) > self.context:
            raise UserError(
                f"the prompt has {len(ids)} tokens, the context has room for {self.context}: shorten it"
                + (", or use --kv-positions contiguous" if self.kv is not None else "")
                + ("" if self.engine == "onnx" else ", or use a larger --context")
            )
        depth = self.depth if settings.depth is None else settings.depth
        request = Request(
            ids,
            settings.max_tokens,
            depth,
            settings.temperature,
            settings.top_p,
            settings.seed,
            self.stop,
            settings.draft_depth,
            settings.draft_tokens,
            settings.exits,
        )
        self._generator.check(request)
        return self._pieces(request, StopTexts(settings.stop))

    def _pieces(self, request: Request, stop: StopTexts) -> Pieces:
        work, stream, count = RequestWork(), TextStream(self.tokenizer), 0
        with closing(self._generator.generate(request, work)) as tokens:
            for token in tokens:
                count += 1
                text = stop.push(stream.push(token))
                if stop.found:
                    break
                yield Piece(text)  # even if empty: the reader can stop after every token
            else:
                text = stop.push(stream.rest()) + stop.rest()
        depths = dict(sorted(Counter(work.depths).items()))
        usage = Usage(len(request.ids), count, work.reused, depths, work.drafted, work.accepted)
        yield Piece(text, "stop" if stop.found else work.finish, usage)

    @property
    def processes(self) -> tuple[int, ...]:
        """Ids of processes that it started."""
        return self._generator.processes

    def tokens(self, request: Request, work: RequestWork) -> Iterator[int]:
        """The tokens of a request, for measurements."""
        return self._generator.generate(request, work)

    def close(self) -> None:
        self._generator.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def choose_engine(engine: str | None, kv: KvBudget | None, kv_type: str | None, place: Place = ANYWHERE) -> str | None:
    """The engine that was asked for, else the one that the other settings need, or None. `UserError` for settings that
    the engine does not have."""
    option, onnx = place.needs_llamacpp(), place.needs_onnx()
    if onnx is not None:
        check_name(place)
        if option is not None or kv_type is not None or engine not in (None, "onnx"):
            raise UserError(
                f"{onnx} is for ONNX Runtime; for llama.cpp it is --gpu-layers N, or a build of your own with "
                "--llama-server"
            )
        return "onnx"
    if kv is not None and place.llama_server is not None:
        raise UserError(
            "--kv-budget: a llama-server has no retaining heads and evicts nothing by a policy; leave out --kv-budget "
            "or --llama-server"
        )
    if kv_type is None and option is None:
        return engine or (None if kv is None else "onnx")
    if engine in (None, "llama.cpp"):
        return "llama.cpp"
    if option is not None:
        raise UserError(f"{option} is for llama.cpp, not for {engine}: leave it out, or add --engine llama.cpp")
    raise UserError(
        "--kv-type is for llama.cpp; an ONNX artifact's keys and values are as it was exported (kv: int8): leave "
        "it out, or add --engine llama.cpp"
    )


def choose_artifact(manifest: BundleManifest, engine: str | None, kind: str | None) -> tuple[str, str]:
    """(engine, type), with defaults for those not given; `UserError` listing the bundle's if it lacks them."""
    pairs = [
        (name, entry.type) for name, form in FORMATS.items() for entry in manifest.artifacts if entry.format == form
    ]
    choices = list(dict.fromkeys(pairs))
    listed = ", ".join(f"{name} {each}" for name, each in choices)
    if engine is not None and engine not in FORMATS:
        raise UserError(
            f"there is no engine {engine!r}; there are: {', '.join(FORMATS)}{did_you_mean(engine, FORMATS)}"
        )
    preferred = sorted(choices, key=lambda choice: choice[0] != "llama.cpp")
    for name, each in preferred:
        if engine in (None, name) and (kind is None or kind.lower() == each.lower()):
            return name, each
    request = " ".join(part for part in (engine, kind) if part)
    types = [each for name, each in choices if engine in (None, name)]
    meant = did_you_mean(kind, types) if kind else ""
    raise UserError(f"the bundle has no artifact for {request}; it has: {listed or 'no artifacts'}{meant}")


def depth_artifacts(manifest: BundleManifest, engine: str, kind: str) -> dict[int, ArtifactEntry]:
    """Depth -> artifact of one engine and type, ascending."""
    entries = [entry for entry in manifest.artifacts if entry.format == FORMATS[engine] and entry.type == kind]
    return {entry.depth: entry for entry in sorted(entries, key=lambda entry: entry.depth)}
