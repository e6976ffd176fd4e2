"""Fetches what tests take from llama.cpp: vocabulary-only GGUF files (tests/unit/test_gguf_vocab.py), and the chat
templates of many models (tests/unit/test_data_masks.py).

They lie in the source distribution of llama-cpp-python, which pip downloads (from whatever index it is set up for)
but does not build. Run `python tests/fetch_llamacpp.py`; what is there already is not fetched again.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

VERSION = "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
NAMES = ("gpt-2", "llama-bpe", "llama-spm", "phi-3", "qwen2")
BUILD = Path(__file__).parent.parent / "build"
VOCABS, TEMPLATES = BUILD / "vocabs", BUILD / "templates"
FILES = tuple(f"ggml-vocab-{name}.gguf{ending}" for name in NAMES for ending in ("", ".inp", ".out"))
MODELS = ("vendor", "llama.cpp", "models")  # where both lie in the source distribution
LEAST = 40  # templates


def download(folder: Path) -> Path:
    """The source distribution, its hash checked. pip prepares its metadata; nothing is compiled or installed."""
    wanted = folder / "wanted.txt"
    wanted.write_text(f"llama-cpp-python=={VERSION} --hash=sha256:{SHA256}\n")
    options = ["--no-deps", "--no-binary", "llama-cpp-python", "--quiet", "--dest", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, "--requirement", str(wanted)], check=True)
    return next(folder.glob("*.tar.gz"))


def wanted(path: Path) -> Path | None:
    """Where a file of the source distribution belongs, if it is one of those that tests read."""
    if path.parts[1:-1] == MODELS and path.name in FILES:
        return VOCABS / path.name
    if path.parts[1:-1] == (*MODELS, "templates") and path.suffix == ".jinja":
        return TEMPLATES / path.name
    return None


def missing() -> list[str]:
    """What is not there."""
    found = [name for name in FILES if not (VOCABS / name).is_file()]
    return found + (["templates"] if len(list(TEMPLATES.glob("*.jinja"))) < LEAST else [])


def main() -> None:
    if not missing():
        return
    for folder in (VOCABS, TEMPLATES):
        folder.mkdir(parents=True, exist_ok=True)
    print(
        f"fetching llama.cpp's vocabularies and templates (llama-cpp-python {VERSION}, 77 MB) into build/", flush=True
    )
    with tempfile.TemporaryDirectory() as temporary, tarfile.open(download(Path(temporary))) as archive:
        for member in archive:
            place = wanted(Path(member.name))
            if place is not None and not place.is_file():
                content = archive.extractfile(member)
                assert content is not None
                partial = place.with_name(f"{place.name}.partial")
                partial.write_bytes(content.read())
                partial.replace(place)
    if missing():
        raise SystemExit(f"the source distribution lacks {', '.join(missing())}")


if __name__ == "__main__":
    main()
