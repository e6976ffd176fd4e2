"""What a model loses at each file size: the best plain type that fits, and the same bytes with a type per tensor.

    python benchmarks/front.py MODEL --text TEXT [--cut CHECKPOINT] [--work FOLDER] [--sizes 60,70,80,90,105,120]
        [--onnx] [--dither]

For each size (MB) every plain type whose file fits and is among the `--plain` largest is measured, and the best of them
is the row "plain"; "sized" is `export.gguf: {size: …}`. With `--cut`, the recovered cut has both rows as well. With
`--onnx` the same for ONNX; its default sizes are those of int4 and int8. All files of one checkpoint have the same
importance matrix. Measured in stock llama.cpp or ONNX Runtime on the first `--tokens` tokens of TEXT in windows of 256;
importance and sensitivity come from a later part of it, from token 20,000 on. KL is to MODEL in torch, for the cut too.
Finished rows are kept in FOLDER, and a run that was stopped goes on.

`--dither` first moves every weight within the step of the 4-bit block that it was in (8-bit for the embedding), for
models that come from a quantized file: a type with that file's grid would find its weights again without any error.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from compress.core.stage import Progress
from compress.data.chat import Encoded
from compress.data.packing import pack
from compress.export.gguf import write_gguf
from compress.export.gguf_sized import GgufSizes
from compress.export.imatrix import collect, load_imatrix, save_imatrix
from compress.export.onnx import build_graph, write_onnx
from compress.export.onnx_sized import OnnxSizes
from compress.export.sensitivity import collect_sensitivity, load_sensitivity, save_sensitivity
from compress.export.sized import Chosen, Sizes
from compress.export.verify import TOP_K, Reference, compare, torch_reference
from compress.modeling.checkpoint import save_checkpoint
from compress.modeling.load import load_model, load_tokenizer, resolve
from compress.runtime.artifact_types import ARTIFACT_TYPES
from compress.runtime.engine import Distribution, ScoringWindow
from compress.runtime.llamacpp_engine import LlamaCppEngine
from compress.runtime.onnx_engine import OnnxEngine

WINDOW, LATER = 256, 20_000
SIZES = "60,70,80,90,105,120"


def dithered(checkpoint: Path, out: Path, seed: int = 7) -> Path:
    """The checkpoint with every weight moved within its step, as the original of a 4-bit file may have been."""
    if not out.exists():
        model, random = load_model(checkpoint), torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                blocks = parameter.data.view(parameter.shape[0], -1, 32)
                step = (blocks.amax(-1) - blocks.amin(-1)) / 15 if ".layers." in name else blocks.abs().amax(-1) / 127
                blocks += (torch.rand(blocks.shape, generator=random) - 0.5) * step[..., None]
        save_checkpoint(model, load_tokenizer(checkpoint), out)
    return out


def windows_of(ids: Sequence[int], start: int, tokens: int) -> list[list[int]]:
    return [list(ids[at : at + WINDOW]) for at in range(start, start + tokens, WINDOW)]


def rows_of(ids: Sequence[int], tokens: int) -> list[Encoded]:
    rows = windows_of(ids, LATER, tokens)
    return [Encoded(row, [True] * WINDOW, number, 0) for number, row in enumerate(rows)]


class Front:
    """GGUF files of one checkpoint, measured against the reference."""

    sizes: Sizes[Any]

    def __init__(self, checkpoint: Path, reference: Reference, ids: Sequence[int], work: Path):
        work.mkdir(parents=True, exist_ok=True)
        self.checkpoint, self.reference, self.work = checkpoint, reference, work
        if not (work / "sensitivity.safetensors").exists():
            model = load_model(checkpoint)
            save_imatrix(collect(model, pack(rows_of(ids, 8192), 512, 4, 0)), work / "imatrix.safetensors")
            sensitivity = collect_sensitivity(model, pack(rows_of(ids, 2048), WINDOW, 1, 0))
            save_sensitivity(sensitivity, work / "sensitivity.safetensors")
        self.imatrix = load_imatrix(work / "imatrix.safetensors")
        self.sensitivity = load_sensitivity(work / "sensitivity.safetensors")
        self.open()

    def open(self) -> None:
        self.sizes = gguf = GgufSizes(checkpoint=self.checkpoint)
        self.plain_bytes = gguf.plain

    def measured(self, name: str, like: str, **options: Any) -> dict[str, Any]:
        """Write a file, measure it, and remove it."""
        record = self.work / f"{self.sizes.form}-{name}.json"
        if not record.exists():
            size, scores = self.scores(self.work / name, name, like, **options)
            found = {"name": name, "bytes": size, **compare(self.reference, scores)}
            record.write_text(json.dumps(found), encoding="utf-8")
        return json.loads(record.read_text(encoding="utf-8"))

    def scores(self, place: Path, name: str, like: str, **options: Any) -> tuple[int, list[list[Distribution]]]:
        file = place.with_suffix(".gguf")
        write_gguf(self.checkpoint, file, like, **options)
        with LlamaCppEngine(file, 0, context=WINDOW + 8, slots=1) as engine:
            scores = engine.score(self.reference.windows, top_k=TOP_K)
        size = file.stat().st_size
        file.unlink()
        return size, scores

    def plain(self, size: int, count: int) -> dict[str, Any] | None:
        """The best of the plain types with the `count` largest files that fit."""
        fitting = sorted((b, mix) for mix, b in self.plain_bytes.items() if b <= size)
        rows = [
            self.measured(mix, mix, imatrix=self.imatrix if ARTIFACT_TYPES[mix].calibrated else None)
            for _, mix in fitting[-count:]
        ]
        return min(rows, key=lambda row: row["kl"]) if rows else None

    def sized(self, size: int) -> dict[str, Any] | None:
        """A type per tensor."""
        if size < self.sizes.smallest:
            return None
        name = f"{size / 1e6:g}MB"
        cache = self.work / f"damage-{self.sizes.form}.json"
        chosen = self.sizes.chosen(name, self.sensitivity, self.imatrix, cache=cache, progress=Progress())
        row = self.measured(name, chosen.like, **self.options(chosen))
        return row | {"estimate": chosen.damage, "types": str(chosen)}

    def options(self, chosen: Chosen[Any]) -> dict[str, Any]:
        return {"types": chosen.types, "imatrix": chosen.importance}


class OnnxFront(Front):
    """ONNX folders of one checkpoint, measured against the reference."""

    def open(self) -> None:
        self.built = build_graph(self.checkpoint, self.work / "built", Progress())
        self.sizes = self.onnx = OnnxSizes(self.checkpoint, self.built)
        self.plain_bytes = {kind: self.measured(kind, kind, imatrix=self.imatrix)["bytes"] for kind in ("int4", "int8")}

    def scores(self, place: Path, name: str, like: str, **options: Any) -> tuple[int, list[list[Distribution]]]:
        written = write_onnx(self.checkpoint, place, name, built=self.built, **options)
        with OnnxEngine(place) as engine:
            scores = engine.score(self.reference.windows)
        shutil.rmtree(place)
        return written.bytes, scores

    def options(self, chosen: Chosen[Any]) -> dict[str, Any]:
        by_node = self.onnx.by_node(chosen)
        return {"grids": by_node.types, "imatrix": by_node.importance}


def show(size: int, label: str, row: dict[str, Any] | None) -> None:
    if row is None:
        print(f"{size / 1e6:6.0f} MB  {label:16}  no file is so small", flush=True)
        return
    print(
        f"{size / 1e6:6.0f} MB  {label:16}  {row['name']:8} {row['bytes'] / 1e6:7.2f} MB  perplexity "
        f"{row['perplexity']:7.3f}  KL {row['kl']:.4f}  top-1 agreement {row['top1_agreement']:.3f}"
        + (f"  estimated {row['estimate']:.4f}: {row['types']}" if "types" in row else ""),
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--cut", type=Path, help="checkpoint of a pruned and recovered model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build/front"))
    parser.add_argument("--sizes", help="MB, such as 60,70,80,90,105,120")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--plain", type=int, default=3, help="plain types measured for each size")
    parser.add_argument("--onnx", action="store_true")
    parser.add_argument("--dither", action="store_true")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    base = resolve(options.model, options.work / "sources")
    if options.dither:
        base = dithered(base, options.work / "dithered")
    text = options.text.read_text(encoding="utf-8")
    ids: list[int] = list(load_tokenizer(base)(text, add_special_tokens=False, verbose=False)["input_ids"])
    windows = [ScoringWindow.of(window) for window in windows_of(ids, 0, options.tokens)]
    reference = torch_reference(load_model(base), windows)
    checkpoints = {"unpruned": base} | ({"cut": options.cut} if options.cut else {})
    kind = OnnxFront if options.onnx else Front
    fronts = {name: kind(path, reference, ids, options.work / name) for name, path in checkpoints.items()}
    precise = "int8" if options.onnx else "F16"
    for name, front in fronts.items():
        show(front.plain_bytes[precise], f"{name}, {precise}", front.measured(precise, precise))
    sizes = [round(float(part) * 1e6) for part in (options.sizes or SIZES).split(",")]
    if options.onnx and not options.sizes:
        sizes = list(fronts["unpruned"].plain_bytes.values())
    for size in sizes:
        for name, front in fronts.items():
            show(size, f"{name}, plain", front.plain(size, options.plain))
            show(size, f"{name}, sized", front.sized(size))


if __name__ == "__main__":
    main()
