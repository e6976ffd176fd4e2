"""Training through the rounded weights against rounding afterwards, at equal learned tokens: docs/research/log.md.

    python benchmarks/quantize_as.py --run runs/smollm2-135m-24L --text wikitext2_valid.txt [--types Q4_0,int4]
        [--after 0,0.75] [--scales Q4_0] [--steps 16] [--seeds 1] [--out build/quantize_as]

From the data and prune stages of a run of the default recipe: its conversations (all tokens are learned), its healed
cut. One student is trained in float and then rounded as each type; one for each type is trained with `quantize_as`,
over the same rows in the same order. For the types in --scales the file of the float student also has its scales
trained, on as many rows again. Perplexity and KL to the unpruned model are those of the rounded weights in torch.
What is finished is kept in OUT.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from compress.api import distill
from compress.core.files import read_json, write_json
from compress.core.stage import Context, Inputs
from compress.evaluation.stage import Subject
from compress.export.config import TrainScales
from compress.export.gguf import write_gguf
from compress.export.imatrix import carried_imatrix
from compress.export.rounding import WeightRounder, weight_rounder
from compress.export.scale_files import GgufScales
from compress.export.scale_training import ScaleRows, train_scales
from compress.export.scales import ScaledMatrix
from compress.modeling.load import load_config, load_model
from compress.modeling.types import CausalModel
from study import Study, comparison

PER_STEP = 256


class Rounding(Study):
    """What every way starts from, the students, and their figures."""

    def __init__(self, options: argparse.Namespace):
        super().__init__(options.model, options.out)
        self.options = options
        (self.data,), (pruned,) = (sorted(options.run.glob(f"{stage}-*")) for stage in ("data", "prune"))
        self.start = pruned / "model"
        self.measuring = self.bench(options.text, [], options.measured, 1)

    def student(self, kind: str | None, seed: int, after: float = 0.0) -> tuple[Path, dict[str, float]]:
        """A checkpoint, and the processor seconds and learned tokens that it took."""
        tune: dict[str, Any] = {"kind": "lora", "rank": 16}
        section: dict[str, Any] = {
            "objective": "kd",
            "tune": tune | ({"quantize_as": kind, "quantize_after": after} if kind else {}),
            "teacher": "shared",
            "learn": "all",
            "lr": 1e-3,
            "batch": 1,
            "length": PER_STEP,
            "accumulate": 1,
            "max_steps": self.options.steps,
            "eval_every": self.options.steps // 2,
            "select": "last",
        }
        name, begun = f"{kind}-{after}-{seed}" if kind else f"float-{seed}", time.process_time()
        folder = self.made(name, distill, self.start, seed, base=self.base, rows=self.data, **section)
        file = self.out / f"{name}.json"
        if not file.exists():
            learned = read_json(folder / "manifest.json")["metrics"]["target_tokens"]
            write_json(file, {"cpu_seconds": round(time.process_time() - begun, 1), "learned": learned})
        return folder / "model", read_json(file)

    def report(self, way: str, model: CausalModel, folder: Path, **beside: object) -> None:
        """Measure weights, and print a line."""
        name = way.replace(" ", "-").replace(",", "")
        blocks = load_config(folder).num_hidden_layers
        found = self.measuring.measured(Subject(name, lambda: model, folder, blocks))
        assert found.perplexity is not None
        figures = {"perplexity": round(found.perplexity, 2), "kl": round(found.kl_to_base or 0.0, 4)}
        print(json.dumps({"way": way, **figures, **beside}), flush=True)

    def rounder(self, folder: Path, kind: str, name: str) -> WeightRounder:
        """The export's rounding of a checkpoint, by the importance matrix that the export would take."""
        return weight_rounder(Inputs(self.base, folder, {"data": self.data}), self.out / name, Context(), kind)


@torch.no_grad()
def rounded(folder: Path, rounder: WeightRounder) -> CausalModel:
    """A checkpoint with the weights that its export holds."""
    carried = carried_imatrix(folder)
    if carried is not None:  # which the export takes
        rounder = type(rounder)(folder, rounder.type, carried)
    model = load_model(folder)
    for name, parameter in model.named_parameters():
        found = rounder.round(name, parameter.float()) if parameter.ndim == 2 else None
        if found is not None:
            parameter.copy_(found[0])
    return model


@torch.no_grad()
def with_scales(study: Rounding, folder: Path, rounder: WeightRounder, seed: int) -> CausalModel:
    """A checkpoint with the weights of its GGUF file after its scales were trained."""
    options, depths = study.options, [load_config(folder).num_hidden_layers]
    file, state = study.out / f"scales-{seed}.gguf", study.out / f"scales-{seed}.safetensors"
    write_gguf(folder, file, rounder.type, imatrix=rounder.imatrix)
    config = TrainScales(steps=options.steps, eval_every=options.steps // 2, held_out=1024)
    with torch.enable_grad():
        rows = ScaleRows(config, folder, study.data, depths, Context(seed=seed))
        train_scales(rows, GgufScales([file], folder), rounder.type, state)
    model = load_model(folder)
    for name, found in GgufScales([file], folder).weights():
        model.get_parameter(name).copy_(found.values() if isinstance(found, ScaledMatrix) else found)
    return model


def main() -> None:
    parser = comparison(__doc__, "build/quantize_as")
    parser.set_defaults(measured=2048)
    parser.add_argument("--run", type=Path, required=True, help="folder of a run of smollm2_135m_24L")
    parser.add_argument("--types", default="Q4_0,int4")
    parser.add_argument("--after", default="0,0.75", help="shares of the steps that are made without rounding")
    parser.add_argument("--scales", default="Q4_0", help="GGUF types whose scales are trained as well")
    parser.add_argument("--steps", type=int, default=16, help=f"of up to {PER_STEP} tokens")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    study = Rounding(options)
    study.report("base", load_model(study.base), study.base)
    study.report("healed, float", load_model(study.start), study.start)
    for seed in range(1, options.seeds + 1):
        plain, cost = study.student(None, seed)
        study.report(f"float {seed}", load_model(plain), plain, **cost)
        for kind in options.types.split(","):
            rounder = study.rounder(plain, kind, f"float-{seed}-imatrix")
            study.report(f"float, then {kind} {seed}", rounded(plain, rounder), plain)
            for after in map(float, options.after.split(",")):
                folder, cost = study.student(kind, seed, after)
                way = f"quantize_as {kind} after {after} {seed}"
                study.report(way, rounded(folder, rounder), folder, **cost)
            if kind in options.scales.split(","):
                began = time.process_time()
                model = with_scales(study, plain, rounder, seed)
                seconds = round(time.process_time() - began, 1)
                study.report(f"float, then {kind}, then scales {seed}", model, plain, cpu_seconds=seconds)


if __name__ == "__main__":
    main()
