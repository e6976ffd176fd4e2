"""Fetches llama.cpp's vocabulary-only GGUF files, against which tests/test_gguf_vocab.py compares.

They lie in the source distribution of llama-cpp-python, which pip downloads (from whatever index it is set up for)
but does not build. Run `python tests/fetch_vocabs.py`; what is there already is not fetched again.
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
FOLDER = Path(__file__).parent.parent / "build" / "vocabs"
FILES = tuple(f"ggml-vocab-{name}.gguf{ending}" for name in NAMES for ending in ("", ".inp", ".out"))


def download(folder: Path) -> Path:
    """The source distribution, its hash checked. pip prepares its metadata; nothing is compiled or installed."""
    wanted = folder / "wanted.txt"
    wanted.write_text(f"llama-cpp-python=={VERSION} --hash=sha256:{SHA256}\n")
    options = ["--no-deps", "--no-binary", "llama-cpp-python", "--quiet", "--dest", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, "--requirement", str(wanted)], check=True)
    return next(folder.glob("*.tar.gz"))


def main() -> None:
    if all((FOLDER / name).is_file() for name in FILES):
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    print(f"fetching llama.cpp's vocabularies (llama-cpp-python {VERSION}, 77 MB) into {FOLDER.name}/", flush=True)
    with tempfile.TemporaryDirectory() as temporary, tarfile.open(download(Path(temporary))) as archive:
        for member in archive:
            path = Path(member.name)
            if path.name in FILES and path.parent.parts[1:] == ("vendor", "llama.cpp", "models"):
                content = archive.extractfile(member)
                assert content is not None
                partial = FOLDER / f"{path.name}.partial"
                partial.write_bytes(content.read())
                partial.replace(FOLDER / path.name)
    missing = [name for name in FILES if not (FOLDER / name).is_file()]
    if missing:
        raise SystemExit(f"the source distribution lacks {', '.join(missing)}")


if __name__ == "__main__":
    main()
