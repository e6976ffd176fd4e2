"""generate, chat and bench from the command line, on a tiny bundle."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from compress.core.errors import UserError
from compress.runtime import bench
from compress.runtime.bench import DepthFigures, choose_depth, measure_all, measure_draft
from compress.runtime.session import Session, Settings


def compress(*arguments: object, text: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "compress", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, input=text)


def answer(bundle: Path, text: str, **settings) -> str:
    with Session(bundle, "onnx", threads=1) as session:
        return "".join(p.text for p in session.chat([{"role": "user", "content": text}], Settings(**settings)))


def test_generate_with_a_draft_says_how_many_were_accepted(bundle):
    common = (bundle, "--prompt", "the way", "--engine", "onnx", "--max-tokens", 12, "--threads", 1)
    plain = compress("generate", *common)
    drafted = compress("generate", *common, "--draft-depth", 2, "--draft-tokens", 3)
    assert plain.returncode == 0 and plain.stdout == drafted.stdout == answer(bundle, "the way", max_tokens=12) + "\n"
    assert "drafted tokens accepted" in drafted.stderr and "drafted" not in plain.stderr
    assert "onnx fp32 on cpu; depth 4" in plain.stderr
    early = compress("generate", *common, "--early-exit", "0", "--quiet")
    assert early.stdout == answer(bundle, "the way", max_tokens=12, depth=2) + "\n" and early.stderr == ""


def test_generate_reads_standard_input_and_raw_text(bundle):
    done = compress("generate", bundle, "-p", "-", "--raw", "--engine", "onnx", "--max-tokens", 4, text="the way of")
    with Session(bundle, "onnx", threads=1) as session:
        expected = "".join(piece.text for piece in session.complete("the way of", Settings(max_tokens=4)))
    assert done.stdout == expected + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--depth", "9"], "there is no depth 9 here; there are: 2, 3, 4"),
        (["--depth", "deep"], "--depth deep: must be a number or auto"),
        (["--depth", "auto"], "--latency-ms, --memory-mb"),
        (["--latency-ms", "5"], "no effect without --depth auto"),
        (["--engine", "tensorrt"], "there is no engine 'tensorrt'"),
        (["--type", "Q8_0"], "the bundle has no artifact for Q8_0; it has: onnx fp32, llama.cpp F16"),
        (["--early-exit", "often"], "--early-exit often: must be a probability"),
        (["--max-tokens", "0"], "at least 1"),
        (["--seed", "-4"], "seed must be at least 0, not -4"),
    ],
)
def test_misuse_is_one_message(bundle, arguments, message):
    done = compress("generate", bundle, "--prompt", "x", "--threads", "1", *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_no_bundle(tmp_path):
    done = compress("chat", tmp_path)
    assert done.returncode == 2 and "is not a bundle" in done.stderr


def test_chat_goes_on_and_ends(bundle):
    lines = "the way\n/depth 2\n/depth 7\n\nand so\n/reset\nthe way\n/exit\nnever read\n"
    done = compress("chat", bundle, "--engine", "onnx", "--max-tokens", 6, "--threads", 1, text=lines)
    assert done.returncode == 0
    first = answer(bundle, "the way", max_tokens=6)
    talk = [{"role": "user", "content": "the way"}, {"role": "assistant", "content": first}]
    with Session(bundle, "onnx", threads=1) as session:
        talk.append({"role": "user", "content": "and so"})
        second = "".join(p.text for p in session.chat(talk, Settings(max_tokens=6, depth=2)))
    third = answer(bundle, "the way", max_tokens=6, depth=2)
    assert done.stdout == f"{first}\n{second}\n{third}\n"
    assert "/depth 7: give one of the bundle's depths: 2, 3, 4" in done.stderr
    assert compress("chat", bundle, "--threads", 1, text="").returncode == 0


def test_a_conversation_past_the_context_is_refused_and_goes_on(bundle):
    lines = "way " * 600 + "\nthe way\n"
    done = compress("chat", bundle, "--engine", "onnx", "--max-tokens", 6, "--threads", 1, text=lines)
    assert done.returncode == 0 and "the context has room for" in done.stderr
    assert done.stdout == answer(bundle, "the way", max_tokens=6) + "\n"


def test_measuring_every_depth(bundle):
    told: list[DepthFigures] = []
    found = measure_all(bundle, done=told.append, prompt_tokens=12, new_tokens=4, threads=1)
    assert [(f.engine, f.depth) for f in found] == [(e, d) for e in ("llama.cpp", "onnx") for d in (2, 3, 4)]
    assert told == found
    for figures in found:
        assert figures.first_token_seconds > 0 and figures.decode_tokens_per_second > 0 and figures.load_seconds > 0
        assert figures.prefill_tokens_per_second == pytest.approx(12 / figures.first_token_seconds)
        assert 20e6 < figures.peak_memory_bytes < 2e9
    draft = measure_draft(bundle, "onnx", "fp32", 2, draft_tokens=2, new_tokens=8, threads=1)
    assert draft.equal and 0 <= draft.acceptance <= 1 and draft.depth == 4


def test_auto_takes_the_deepest_that_fits(bundle, monkeypatch):
    def figures(depth: int) -> DepthFigures:
        return DepthFigures("onnx", "fp32", depth, 16, 0.1, 160.0, 1000 / (10 * depth), 100_000_000 * depth, 0.1)

    asked: list[int] = []

    def measure(_bundle, _engine, _kind, depth, **_settings):
        asked.append(depth)
        return figures(depth)

    monkeypatch.setattr(bench, "measure_depth", measure)
    assert choose_depth(bundle, "onnx", None, latency_ms=40).depth == 4 and asked == [4]
    assert choose_depth(bundle, "onnx", None, latency_ms=35).depth == 3
    assert choose_depth(bundle, "onnx", None, latency_ms=35, memory_bytes=250_000_000).depth == 2
    message = (
        r"no depth of .* meets 5 ms per token and 300 MB \(measured: depth 4: 40.0 ms, 400 MB; depth 3: .*; depth 2:"
    )
    with pytest.raises(UserError, match=message):
        choose_depth(bundle, "onnx", None, latency_ms=5, memory_bytes=300_000_000)


def test_auto_measures(bundle):
    done = compress(
        "generate", bundle, "--prompt", "the way", "--engine", "onnx", "--max-tokens", 6, "--threads", 1,
        "--depth", "auto", "--latency-ms", 10_000, "--memory-mb", 4000,
    )  # fmt: skip
    assert done.stdout == answer(bundle, "the way", max_tokens=6) + "\n"
    assert "depth 4: " in done.stderr and "ms per token" in done.stderr
    done = compress("generate", bundle, "--prompt", "the way", "--threads", 1, "--depth", "auto", "--memory-mb", 5)
    assert done.returncode == 2 and "meets 5 MB (measured: depth 4: " in done.stderr


def test_bench_prints_and_writes(bundle, tmp_path):
    common = ("bench", bundle, "--prompt-tokens", 8, "--new-tokens", 4, "--repeat", 1, "--threads", 1)
    done = compress(*common, "--engine", "onnx", "--speculate", "--json", "--out", tmp_path / "new" / "b.html")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [entry["depth"] for entry in report["depths"]] == [2, 3, 4]
    assert [entry["role"] for entry in report["depths"]] == ["onnx-fp32@2", "onnx-fp32@3", "onnx-fp32"]
    assert [entry["draft_depth"] for entry in report["drafts"]] == [2, 3]
    page = (tmp_path / "new" / "b.html").read_text(encoding="utf-8")
    assert "<svg" in page and page.count("<td>onnx-fp32") == 3
    assert "<script" not in page and "src=" not in page and "<link" not in page
    assert compress("bench", bundle, "--out", tmp_path / "b.txt").returncode == 2


def test_bench_goes_into_a_runs_report(bundle, tmp_path):
    """Figures show up in the run of their bundle, and not once it was exported anew."""
    from compress.pipeline.report.collect import StageRecord, build_report
    from compress.pipeline.report.html import render
    from compress.records.manifest import BaseModelSource, StageManifest

    entry = {
        "role": "onnx-fp32", "engine": "onnx", "type": "fp32", "depth": 4, "perplexity": 30.0, "prompt_tokens": 8,
        "first_token_seconds": 0.1, "prefill_tokens_per_second": 80.0, "decode_tokens_per_second": 123.4,
        "peak_memory_bytes": 5, "load_seconds": 0.1,
    }  # fmt: skip
    (tmp_path / "bench.json").write_text(
        json.dumps({"stage": "export-aa", "name": "x", "depths": [entry], "drafts": []})
    )
    manifest = StageManifest(
        stage="export", fingerprint="aa", format=1, config={}, inputs={}, seed=0, device="cpu", processes=1,
        base=BaseModelSource(source="m", fingerprint="bb"), versions={}, machine={}, seconds=1.0, resumed=False,
        peak_memory_bytes=5, peak_cuda_bytes=None, metrics={"artifacts": [], "families": []},
    )  # fmt: skip
    for stage, shown in (("export-aa", True), ("export-bb", False)):
        record = StageRecord("export", tmp_path / stage, manifest)
        report = build_report("x", "", [record])
        assert (report.bench is not None) == shown
        assert ("123.4" in render(report)) == shown
