"""report.json and report.html from a made-up run."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from compress.pipeline.report import html, plots
from compress.pipeline.report.schema import Report, StageEntry
from compress.pipeline.report.tasks import task_lines
from compress.pipeline.summary import show
from compress.records.figures import DataFigures
from compress.records.merge import Merged, MergeRecord
from compress.records.models import ModelEntry, Standing, TaskDissent, TaskResult
from compress.records.students import HeldOutFigures, VariantFigures, Variants
from pydantic import ValidationError
from rich.console import Console

DOCS = Path(__file__).parents[2] / "docs" / "reference" / "report.md"
EVIL = '<script>alert("x")</script><img src="http://example.org/x.png">'


def entry(role: str, size: int, perplexity: float, **changes) -> ModelEntry:
    values = {
        "role": role,
        "runtime": "llama.cpp" if role.startswith("gguf") else "torch",
        "blocks": 30 if role == "base" else 24,
        "parameters": size // 4,
        "bytes": size,
        "perplexity": perplexity,
        "kl_to_base": 0.0 if role == "base" else 0.4,
        "top1_agreement": 0.75,
        "positions": 1000,
        "tokens_per_second": 20.0,
        "peak_memory_bytes": 10**9,
    }
    return ModelEntry.model_validate(values | changes)


def point(dropped: list[int], pruned: float, healed: float) -> dict:
    """A point of the curve of `blocks: auto`; the unpruned model's perplexity is 4."""
    ratios = {"pruned_ratio": pruned / 4, "healed_ratio": healed / 4}
    return {"dropped": dropped, "pruned": pruned, "healed": healed, **ratios, "size": 0.5, "latency": None}


@pytest.fixture
def report() -> Report:
    distances = [[0.2, 0.1, 0.15, 0.3], [0.25, 0.18, 0.35], [0.3, 0.4], [0.5]]
    task = TaskResult(kind="choice", metric="accuracy_norm", value=0.52, low=0.48, high=0.56, n=500, chance=0.25)
    after = task.model_copy(
        update={
            "value": 0.455,
            "difference": -0.065,
            "difference_low": -0.09,
            "difference_high": -0.04,
            "kept": 0.875,
            "kept_above_chance": 0.759,
        }
    )
    copying = TaskResult(kind="generation", metric="exact_match", value=0.0, low=0.0, high=0.11, n=32, chance=0.0)
    verification = {
        "runtime": "llama.cpp",
        "positions": 192,
        "perplexity": 6.0,
        "checkpoint_perplexity": 5.9,
        "kl": 0.01,
        "top1_agreement": 0.9,
    }
    return Report(
        name="a-run",
        base="package:x/y.gguf",
        measured_on="held-out self-data",
        models=[
            entry("base", 538_000_000, 4.0, tasks={"builtin:copy": copying, "arc": task}),
            entry("pruned", 425_000_000, 30.0),
            entry("healed", 425_000_000, 9.0),
            entry("recovered", 425_000_000, 6.0, tasks={"builtin:copy": copying, "arc": after}),
            entry("gguf-Q4_K_M", 80_000_000, 6.2, tokens_per_second=100.0),
            entry("onnx-int4", 75_000_000, 9.9),
        ],
        stages=[
            StageEntry(
                name="export",
                folder="export-0a",
                fingerprint="0a",
                seconds=61.5,
                resumed=True,
                peak_memory_bytes=10**9,
                planned_memory_bytes=900 * 10**6,
                metrics={},
            )
        ],
        importance={
            "importance": "angular",
            "position": "all",
            "search": "window",
            "dropped": [1, 2],
            "blocks": 4,
            "values": distances[0],
            "distances": {"all": {"angular": distances, "influence": distances}},
            "trials": {"passes": 12.5, "guard": {"greedy": {"dropped": [1, 2], "held_out": 0.25}}},
            "curve": [
                point([], 4.0, 4.0),
                point([2], 9.0, 5.0),
                point([1, 2], 30.0, 8.0),
                point([0, 1, 2], 90.0, 20.0),
            ],
            "tokens": 1024,
            "kept": [0, 3],
            "healing": [],
        },
        curves=[
            {"step": 0, "eval_loss": 2.0, "eval_kl": 0.9, "eval_perplexity": 9.0},
            {"step": 1, "epoch": 0.5, "loss": 1.0, "nll": 2.0, "kl": 0.8, "lr": 1e-4, "tokens": 100},
            {"step": 2, "eval_loss": 1.0, "eval_kl": 0.5, "eval_perplexity": 6.0},
        ],
        data={
            "rows": 96,
            "train": 84,
            "heldout": 12,
            "seen": 99,
            "dropped": {"empty": 3},
            "cut": 0,
            "kept_share": 0.9697,
            "tokens": 19000,
            "targets": 9000,
        },
        samples=[[{"role": "user", "content": EVIL}, {"role": "assistant", "content": "x" * 5000}]],
        artifacts=[
            {
                "role": "gguf-Q4_K_M",
                "format": "gguf",
                "type": "Q4_K_M",
                "depth": 24,
                "path": "gguf/a.gguf",
                "bytes": 80_000_000,
                "parameters": 100_000_000,
                "bits_per_weight": 6.3,
                "verification": verification | {"tensor_error": 0.05},
            }
        ],
        recipe=f"name: a-run  # {EVIL}",
        versions={"torch": "2"},
        machine={"processor": EVIL, "cores": 2},
    )


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        names = ("src", "href", "xlink:href", "action", "data", "srcset")
        self.links += [value or "" for name, value in attrs if name in names]

    def handle_data(self, data):
        self.text += data


def parsed(report: Report) -> Tags:
    tags = Tags()
    tags.feed(html.render(report))
    return tags


def test_the_page_is_self_contained_and_escapes_what_comes_from_data(report):
    page = parsed(report)
    assert "script" not in page.tags
    assert "img" not in page.tags and "link" not in page.tags and "iframe" not in page.tags
    assert all(link.startswith("#") for link in page.links)  # inside the inline SVG
    style = html.render(report)
    assert "@import" not in style and not re.search(r"url\((?!#)", style)
    assert page.text.count(EVIL) == 3  # row, recipe and processor, as text
    assert page.tags.count("svg") == 5


def test_the_page_shows_every_model_and_its_figures(report):
    text = parsed(report).text
    assert "1.00 GB900.0 MB -10 %" in text.replace("\n", "")  # measured, planned
    for model in report.models:
        assert model.role in text
    for figure in (
        "425.0 MB",
        "80.0 MB",
        "52.0 %",
        "48 to 56",
        "6.2",
        "1 min 1 s",
        "resumed",
        "84 training rows",
        "3 empty",
    ):
        assert figure in text, figure


def test_tasks_are_set_side_by_side_generation_last_and_by_itself(report):
    lines = task_lines(report.models)
    assert [(line.task, line.role, line.first) for line in lines] == [
        ("arc", "base", True),
        ("arc", "recovered", False),
        ("builtin:copy", "base", True),
        ("builtin:copy", "recovered", False),
    ]
    assert lines[0].title == "arc: accuracy_norm, 500 questions, chance 25.0 %"
    assert lines[2].title == "builtin:copy: exact_match, 32 questions"
    assert (lines[0].difference, lines[0].kept) == ("–", "–")
    found = lines[1]
    assert (found.score, found.difference) == ("45.5 %", "-6.5 (-9 to -4)")
    assert (found.kept, found.kept_above_chance) == ("87.5 %", "75.9 %")
    perplexity = TaskResult(kind="other", metric="word_perplexity", value=12.5, n=3, difference=2.5)
    line = task_lines([entry("gguf-Q8_0", 1, 2.0, tasks={"wikitext": perplexity})])[0]
    assert (line.score, line.interval, line.difference, line.kept) == ("12.5", "–", "+2.5", "–")
    text = parsed(report).text
    for part in (lines[0].title, lines[2].title, found.difference, "87.5 %", "75.9 %"):
        assert part in text


def test_the_page_shows_what_the_search_compared_and_the_curve(report):
    text = parsed(report).text
    assert "12.5 forward passes" in text and "0.25" in text
    assert "blocks removed" in html.render(report)
    single = report.importance.model_copy(
        update={"curve": [], "trials": {}, "importance": "taylor", "search": "greedy"}
    )
    page = parsed(report.model_copy(update={"importance": single}))  # no distance across windows, nothing compared
    assert page.tags.count("svg") == 4 and "What the search compared" not in page.text


def variant(name: str, rows: tuple[float, float], kl: float, perplexity: float) -> VariantFigures:
    best = HeldOutFigures(step=20, eval_loss=1.0, eval_kl=kl, eval_perplexity=perplexity)
    return VariantFigures(
        name=name,
        seed=3,
        rows=rows,
        objective="kd",
        steps=40,
        trainable_parameters=8,
        before=best,
        last=best,
        best=best,
        target_tokens=100,
        train_tokens=200,
    )


VARIANTS = Variants(
    length=64,
    batch=1,
    chosen="b",
    variants=[variant("a", (0, 0.5), 0.51, 6.1), variant("b", (0.5, 1), 0.52, 5.9)],
)
MERGE = MergeRecord(
    config={"method": "slerp", "select": "best", "by": "kl", "models": [{"model": "a"}, {"model": "b"}]},
    chosen="merge",
    models=[
        Merged(name="merge", merged=False, eval_kl=0.47, eval_perplexity=5.7),
        Merged(name="a", merged=True, eval_kl=0.513, eval_perplexity=6.12),
        Merged(name="b", merged=True, eval_kl=0.523, eval_perplexity=5.92),
    ],
)


def test_the_page_shows_variants_beside_their_merge(report):
    assert "Variants" not in parsed(report).text and html.students(report) == []
    rows = html.students(report.model_copy(update={"variants": VARIANTS}))
    assert [(row["name"], row["kl"], row["perplexity"], row["kept"]) for row in rows] == [
        ("a", 0.51, 6.1, False),
        ("b", 0.52, 5.9, True),
    ]
    both = report.model_copy(update={"variants": VARIANTS, "merge": MERGE})
    rows = html.students(both)
    assert [(row["name"], row["kl"], row["kept"]) for row in rows] == [
        ("merge", 0.47, True),
        ("a", 0.513, False),
        ("b", 0.523, False),
    ]
    text = parsed(both).text
    for part in ("Variants and their merge", "slerp of a, b", "kd, rows 50.0 % to 100.0 %, seed 3, 40 steps", "5.92"):
        assert part in text, part
    assert text.count("selected") == 2  # in the sentence, and beside the merge


def test_the_page_shows_what_was_rewritten_and_what_was_not(report):
    assert "gold beside" not in parsed(report).text and "gold answers" not in parsed(report).text
    rewritten = {"asked": 80, "origins": {"gold": 20, "own": 12, "rewritten": 48}, "taken_share": 0.75}
    more = {
        "rewritten": rewritten | {"gold_kept": {"differs": 15, "leak": 5}},
        "sets": {"a.jsonl": 60, "b.jsonl": 24},
        "contaminated": {"task.jsonl": 7},
    }
    data = DataFigures.model_validate(report.data.model_dump() | more)
    example = {"prompt": EVIL, "gold": "the gold one", "written": "z" * 900, "origin": "gold", "why": "differs"}
    page = parsed(report.model_copy(update={"data": data, "rewrites": [example]}))
    for words in (
        "Of 80 gold answers the unpruned model's own words replace 75.0 % (12 written without having seen gold); "
        "gold was kept: 15 differs, 5 leak.",
        "Rows by data set: a.jsonl 60, b.jsonl 24.",
        "7 with task.jsonl.",
        "gold, keptthe gold one",
        "not taken, differs" + "z" * 500 + "…",
    ):
        assert words in page.text, words
    assert page.text.count(EVIL) == 4


def test_the_headline_takes_the_smallest_artifact_that_is_good(report):
    small = html.smallest_artifact(report)
    assert small is not None and small.role == "gguf-Q4_K_M"  # the int4 is smaller, but far worse than its checkpoint
    final = html.final_model(report)
    assert final is not None and final.role == "recovered"
    cards = {card["label"]: card for card in html.headline(report)}
    assert cards["size"]["figure"] == "80.0 MB" and "6.7×" in cards["size"]["note"]
    assert cards["perplexity"]["figure"] == "6"
    assert "100 tokens/s" in cards["decoding"]["figure"]


def test_the_headline_of_an_export_alone_is_about_the_artifact(report):
    models = [m for m in report.models if m.role in ("base", "gguf-Q4_K_M")]
    cards = {card["label"]: card for card in html.headline(report.model_copy(update={"models": models}))}
    base, small = models
    assert cards["perplexity"]["note"] == f"gguf-Q4_K_M; base {html.number(base.perplexity)}"
    assert cards["same next token as the unpruned model"]["figure"] == html.percent(small.top1_agreement) != "100.0 %"


def test_a_sorted_model_is_shown_at_every_depth(report):
    """A line per family that has several depths; the deepest checkpoint is the model that was made."""
    assert plots.depth_plot(report) is None and plots.sort_plot(report) is None
    places = [("depth-24", 24), ("depth-12", 12), ("gguf-Q8_0", 24), ("gguf-Q8_0@12", 12)]
    deep = [entry(role, 10**8 * blocks, 200 / blocks, blocks=blocks) for role, blocks in places]
    own = [[{"depth": d, "loss": 1.0, "kl": kl, "perplexity": 9.0} for d, kl in ((12, a), (24, b))] for a, b in
           ((4.0, 1.0), (2.0, 0.5))]  # fmt: skip
    lines = [
        HeldOutFigures(step=i, eval_loss=2.0, eval_kl=1.0, eval_perplexity=7.0, eval_depths=figures)
        for i, figures in enumerate(own)
    ]
    found = report.model_copy(update={"models": [*report.models, *deep], "sort": lines})
    final = html.final_model(found)
    assert final is not None and final.role == "depth-24"
    note = {card["label"]: card for card in html.headline(found)}["perplexity"]["note"]
    assert "recovered 6, depth-12 16.67" in note
    page = html.render(found)
    assert "Quality against depth" in page and "Sorted training on held-out rows" in page
    assert parsed(found).tags.count("svg") == parsed(report).tags.count("svg") + 2
    plot = plots.depth_plot(found)
    assert plot is not None
    for text in ("depth, blocks", "checkpoint", "GGUF", "30 blocks"):
        assert text in plot
    assert "ONNX" not in plot
    sort = plots.sort_plot(found)
    assert sort is not None and ">12<" in sort and ">24<" in sort


def test_rivals_and_what_they_say_are_shown(report, tmp_path):
    """Grey rows behind their artifacts, a sentence for each file, and plots of quality against bytes and time."""
    assert "On the front?" not in html.render(report)
    worse = Standing(
        format="gguf",
        verdict="worse",
        on_front=False,
        rival="base-gguf-Q3_K_S",
        sentence="At 80.0 MB the unpruned model is <better>.",
        conclusion="gguf-Q4_K_M is not on the front.",
    )
    rival = entry("base-gguf-Q3_K_S", 79_000_000, 4.5, runtime="llama.cpp", blocks=30, rival_of=["gguf-Q4_K_M"])
    rival.kl_to_base, rival.prefill_tokens_per_second = 0.2, 300.0
    ours = report.models[4].model_copy(update={"standings": [worse], "prefill_tokens_per_second": 250.0})
    report.models[4:5] = [ours, rival]
    page = html.render(report)
    assert "<li>At 80.0 MB the unpruned model is &lt;better&gt;. gguf-Q4_K_M is not on the front.</li>" in page
    assert '<tr class="rival"><td>base-gguf-Q3_K_S</td>' in page
    assert "KL to the unpruned model against size" in page and "ms per token read" in page
    assert Report.model_validate(json.loads(html.to_json(report))) == report
    console = Console(record=True, width=200)
    show(report, tmp_path, console)
    lines = console.export_text().splitlines()
    places = [next(i for i, line in enumerate(lines) if line.split()[:1] == [m.role]) for m in report.models]
    assert places == sorted(places)
    assert "At 80.0 MB the unpruned model is <better>. gguf-Q4_K_M is not on the front." in lines
    assert (best := html.smallest_artifact(report)) is not None and best.role == "gguf-Q4_K_M"
    rival.prefill_tokens_per_second = None  # nothing was timed
    assert "ms per token read" not in html.render(report)


def test_a_run_without_stages_has_a_page(report):
    empty = report.model_copy(
        update={"models": [], "stages": [], "importance": None, "curves": [], "data": None, "artifacts": []}
    )
    page = parsed(empty)
    assert "svg" not in page.tags and "a-run" in page.text


def test_report_json_round_trips_and_refuses_unknown_keys(report):
    values = json.loads(html.to_json(report))
    assert Report.model_validate(values) == report
    assert values["schema_version"] == 3
    with pytest.raises(ValidationError):
        Report.model_validate(values | {"surprise": 1})


def test_every_key_of_the_schema_is_documented():
    text = DOCS.read_text(encoding="utf-8")
    named = set(re.findall(r"[a-z0-9_]+", text))
    for model in (Report, ModelEntry, StageEntry, TaskResult, Standing, TaskDissent):
        assert set(model.model_fields) <= named, model


def test_writing_is_repeatable(report, tmp_path):
    html.write_report(report, html.render(report), tmp_path)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    html.write_report(report, html.render(report), tmp_path)
    assert first == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(first) == {"report.json", "report.html"}


def test_labels_cover_neither_points_nor_each_other():
    points = [("recovered", 100.0, 100.0), ("healed", 102.0, 101.0), ("pruned", 101.0, 140.0), ("base", 99.0, 99.0)]
    offsets = plots.label_offsets(points, 1.0, 90.0, 400.0)
    boxes = [
        (x + dx, y + dy - 5, x + dx + 4.6 * len(text), y + dy + 5)
        for (text, x, y), (dx, dy) in zip(points, offsets, strict=True)
    ]
    marks = [(x - 4, y - 4, x + 4, y + 4) for _, x, y in points]
    assert all(box[0] >= 90 for box in boxes)
    for i, box in enumerate(boxes):
        for other in boxes[:i] + marks:
            assert box[0] >= other[2] or other[0] >= box[2] or box[1] >= other[3] or other[1] >= box[3]


def test_the_summary_names_figures_and_paths(report, tmp_path):
    (tmp_path / "export-0a" / "bundle").mkdir(parents=True)
    console = Console(record=True, width=160)
    show(report, tmp_path, console)
    text = console.export_text()
    assert str(tmp_path / "report.html") in text.replace("\n", "")
    assert str(tmp_path / "export-0a" / "bundle") in text.replace("\n", "")
    for part in (
        "base",
        "recovered",
        "gguf-Q4_K_M",
        "80.0 MB",
        "6.2",
        "arc: accuracy_norm",
        "87.5 %",
        "75.9 %",
        "exact_match",
    ):
        assert part in text
