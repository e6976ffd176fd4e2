"""The bundle's README.md (a model card) and Ollama Modelfile."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from ..runtime.bundle import Manifest


def write_card(bundle: Path, manifest: Manifest) -> None:
    """Write README.md, and a Modelfile where there is a GGUF; both follow from the manifest alone."""
    import jinja2

    template = files("compress.export").joinpath("card.md.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, autoescape=False, keep_trailing_newline=True)
    text = environment.from_string(template).render(
        manifest=manifest,
        base=manifest.provenance.get("base"),
        base_blocks=manifest.provenance.get("base_blocks", len(manifest.kept_blocks)),
        recovered="distill" in manifest.provenance.get("stages", {}),
        kept=ranges(manifest.kept_blocks),
    )
    (bundle / "README.md").write_text(text, encoding="utf-8")
    for artifact in manifest.artifacts:
        if artifact.format == "gguf":
            (bundle / "Modelfile").write_text(f"FROM ./{artifact.path}\n", encoding="utf-8")
            break


def ranges(numbers: list[int]) -> str:
    """0, 1, 2, 5 as 0-2, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
