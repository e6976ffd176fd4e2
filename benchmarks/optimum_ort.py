"""Does a bundle's ONNX folder run in Optimum's `ORTModelForCausalLM`, and write what our runtime writes?

Optimum's ONNX side needs an older transformers than we do, so this runs in an environment of its own:

    python -m venv build/optimum
    build/optimum/bin/pip install torch 'optimum-onnx[onnxruntime]==0.1.0' 'transformers<4.58' pydantic
    build/optimum/bin/pip install --no-deps .
    build/optimum/bin/python benchmarks/optimum_ort.py BUNDLE …

Model, configuration and tokenizer are loaded by Optimum and transformers from the bundle alone. For each type and depth
both write greedy texts. ONNX Runtime's integer kernels give other logits for one token at a time than for several at
once, so that a choice between near-equal tokens may fall otherwise: texts may part where Optimum's own logits put the
two tokens no further apart than its logits with and without cache differ somewhere in that text. The exit code is 1 if
a folder did not load, or a text parts where it may not.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from compress.api import Session
from compress.records.bundle import ArtifactEntry
from compress.runtime.bundle import read_bundle
from compress.runtime.generator import Request, RequestWork
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

PROMPTS = ["Hello", "The capital of France is", "One, two, three, four, five, six, seven"]


def graph_of(folder: Path) -> Path:
    """A depth's graph: those of all depths lie in the deepest's folder, and genai_config.json says where that is."""
    config: Any = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    return folder / config["model"]["decoder"]["filename"]


class Optimum:
    """An ONNX folder of a bundle in Optimum."""

    def __init__(self, bundle: Path, artifact: ArtifactEntry):
        graph = graph_of(bundle / artifact.path).relative_to(bundle)
        self.model = ORTModelForCausalLM.from_pretrained(bundle, subfolder=str(graph.parent), file_name=graph.name)
        self.tokenizer = AutoTokenizer.from_pretrained(bundle)

    def write(self, prompt: str, tokens: int) -> tuple[list[int], list[int], torch.Tensor, float]:
        """(prompt ids, new ids, the logits they were chosen by (T, V), how far those differ from logits without
        cache)."""
        inputs = self.tokenizer(prompt, return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        found = self.model.generate(
            **inputs, max_new_tokens=tokens, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        logits = torch.stack([step[0] for step in found.logits])
        ids = found.sequences[:, :-1]
        whole = self.model(ids, attention_mask=torch.ones_like(ids), use_cache=True).logits[0, length - 1 :]
        new = found.sequences[0, length:].tolist()
        return inputs["input_ids"][0].tolist(), new, logits, float((logits - whole).abs().max())


def compare(bundle: Path, artifact: ArtifactEntry, tokens: int) -> tuple[bool, str]:
    """Whether all is well, and what was found."""
    try:
        optimum = Optimum(bundle, artifact)
        found = [optimum.write(prompt, tokens) for prompt in PROMPTS]
    except Exception as error:
        return False, f"does not run: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
    same, parted, well = 0, [], True
    with Session(bundle, "onnx", artifact.type, threads=1) as session:
        for prompt, (ids, new, logits, noise) in zip(PROMPTS, found, strict=True):
            if session.tokenizer.encode(prompt, begin=True) != ids:
                return False, f"another tokenization of {prompt!r}: {ids}"
            ours = list(session.tokens(Request(ids, tokens, artifact.depth, stop=session.stop), RequestWork()))
            theirs = [token for token in new if token not in session.stop]
            pairs = list(zip(ours, theirs, strict=False))
            at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
            if at is None:
                same += 1
                well &= len(ours) == len(theirs)
                continue
            margin = float(logits[at, theirs[at]] - logits[at, ours[at]])
            well &= margin <= noise
            parted.append(f"token {at + 1}: {margin:.4f} apart, cache makes {noise:.4f}")
    text = f"{same} of {len(PROMPTS)} texts of {tokens} tokens are the same"
    return well, "; ".join([text, *parted])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=32)
    arguments = parser.parse_args()
    all_well = True
    for bundle in arguments.bundles:
        for artifact in (entry for entry in read_bundle(bundle).artifacts if entry.format == "onnx"):
            well, text = compare(bundle, artifact, arguments.tokens)
            print(f"{'ok  ' if well else 'FAIL'} {bundle.name} {artifact.role}, {artifact.depth} blocks: {text}")
            all_well &= well
    sys.exit(0 if all_well else 1)


if __name__ == "__main__":
    main()
