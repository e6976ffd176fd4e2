"""What training the scales of quantized files gains: KL to the checkpoint and perplexity, before and after.

    python benchmarks/trained_scales.py runs/x/distill-0a1b2c/model runs/x/data-3d4e5f [--types int4,Q4_0]
        [--text FILE] [--lr 1e-3,1.5e-3] [--steps N] [--rival]

The rows are a data stage's folder. Each type is written once as the export stage writes it, importance matrix
included; then, for each learning rate, a copy of it is trained. Held-out KL is that of the weights, in torch; `--text`
adds KL and perplexity of a text of your own in the stock runtime, the first `--tokens` tokens of it in windows, so
that activations are rounded as users have them. `--rival` adds onnxruntime-genai's own int4, round to nearest.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clock import timed
from compress.core.stage import Context, Inputs
from compress.data.calibration import calibration_batches
from compress.export.config import TrainScales
from compress.export.gguf import write_gguf
from compress.export.imatrix import collect
from compress.export.onnx import write_onnx
from compress.export.scale_files import GgufScales, OnnxScales, ScaleFiles
from compress.export.scale_training import ScaleRows, train_scales
from compress.export.verify import TOP_K, compare, torch_reference
from compress.modeling.load import load_config, load_model, load_tokenizer
from compress.runtime.artifact_types import ARTIFACT_TYPES, GGUF_TYPES
from compress.runtime.engine import Engine, ScoringWindow
from compress.runtime.genai_engine import GenaiEngine
from compress.runtime.llamacpp_engine import LlamaCppEngine
from compress.runtime.onnx_engine import OnnxEngine


def read_windows(options: argparse.Namespace) -> list[ScoringWindow]:
    """The beginning of the text in windows; none without a text."""
    if options.text is None:
        return []
    tokenizer = load_tokenizer(options.model)
    text = options.text.read_text(encoding="utf-8")[: 8 * options.tokens]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][: options.tokens]
    starts = range(0, len(ids), options.window)
    return [ScoringWindow.of(ids[start : start + options.window]) for start in starts if start + 1 < len(ids)]


class Measure:
    """Files against the checkpoint on a text."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.windows = options, read_windows(options)
        self.model = load_model(options.model)

    def text(self, path: Path) -> dict[str, float]:
        """Perplexity and KL of a file in its runtime, and the checkpoint's perplexity."""
        if not self.windows:
            return {}
        found = []
        with self._engine(path) as engine:
            for window in self.windows:
                reference = torch_reference(self.model, [window])
                scores = engine.score([window], TOP_K if isinstance(engine, LlamaCppEngine) else None)
                found.append((len(window.positions), compare(reference, scores)))
        tokens = sum(count for count, _ in found)

        def mean(figure: str, log: bool = False) -> float:
            return sum(n * (math.log(f[figure]) if log else f[figure]) for n, f in found) / tokens

        return {
            "text_perplexity": round(math.exp(mean("perplexity", log=True)), 3),
            "text_perplexity_float": round(math.exp(mean("checkpoint_perplexity", log=True)), 3),
            "text_kl": round(mean("kl"), 4),
        }

    @contextmanager
    def _engine(self, path: Path) -> Iterator[Engine]:
        threads = self.options.threads
        if path.suffix == ".gguf":
            engine: Engine = LlamaCppEngine(path, threads, context=self.options.window + 8, slots=1)
        elif path.name == "rival":  # its graph counts positions itself
            engine = GenaiEngine(path)
        else:
            engine = OnnxEngine(path, threads)
        with engine:
            yield engine


def write(options: argparse.Namespace, kind: str, imatrix: dict[str, Any], path: Path) -> None:
    weights = imatrix if ARTIFACT_TYPES[kind].calibrated else None
    if kind in GGUF_TYPES:
        write_gguf(options.model, path, kind, imatrix=weights, threads=options.threads)
    else:
        write_onnx(options.model, path, kind, imatrix=weights)


def copied(path: Path, name: str) -> Path:
    """A copy of a file or folder beside it."""
    to = path.with_name(f"{name}{path.suffix}")
    if path.is_dir():
        shutil.copytree(path, to)
    else:
        shutil.copyfile(path, to)
    return to


def size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.iterdir())


def scales_of(path: Path, model: Path) -> ScaleFiles:
    return GgufScales([path], model) if path.suffix == ".gguf" else OnnxScales(path, model)


def rival(options: argparse.Namespace, work: Path) -> Path:
    """onnxruntime-genai's own int4 of the checkpoint."""
    folder = work / "rival"
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(options.model), "-o", str(folder)]
    subprocess.run([*command, "-p", "int4", "-e", "cpu", "-c", str(work / "cache")], check=True, capture_output=True)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="a checkpoint folder")
    parser.add_argument("rows", type=Path, help="a data stage's folder")
    parser.add_argument("--types", default="int4")
    parser.add_argument("--text", type=Path, help="a text file to measure on as well")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--lr", default="1.5e-3", help="learning rates, comma-separated")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rival", action="store_true")
    options = parser.parse_args()
    model, context = options.model, Context(seed=options.seed)
    measure = Measure(options)
    batches = calibration_batches(
        Inputs(model, model, {"data": options.rows}), load_tokenizer(model), tokens=8192, length=512, batch=4
    )
    imatrix = collect(measure.model, batches)
    depths = [load_config(model).num_hidden_layers]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if options.rival:
            path = rival(options, work)
            print(json.dumps({"type": "int4 by genai", "bytes": size_of(path), **measure.text(path)}), flush=True)
        for kind in options.types.split(","):
            path = work / f"{kind}{'.gguf' if kind in GGUF_TYPES else ''}"
            write(options, kind, imatrix, path)
            before = measure.text(path)
            print(json.dumps({"type": kind, "bytes": size_of(path), **before}), flush=True)
            for lr in map(float, options.lr.split(",")):
                trained = copied(path, f"{kind}-{lr}")
                rows = ScaleRows(TrainScales(lr=lr, steps=options.steps), model, options.rows, depths, context)
                state = work / f"{kind}-{lr}.safetensors"
                found, took = timed(train_scales, rows, scales_of(trained, model), kind, state)
                if found is None:
                    sys.exit(f"{kind} has no scales to train")
                after = measure.text(trained)
                ratios = {"held_out_kl_ratio": round(found.held_out_kl / found.held_out_kl_before, 3)}
                if after:
                    ratios["text_kl_ratio"] = round(after["text_kl"] / before["text_kl"], 3)
                times = {"seconds": round(took.wall, 1), "cpu_seconds": round(took.cpu, 1)}
                print(
                    json.dumps({"type": kind, "lr": lr, **times, **found.model_dump(), **after, **ratios}), flush=True
                )


if __name__ == "__main__":
    main()
