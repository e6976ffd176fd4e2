"""report.html: one self-contained page."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from ...core.files import json_text, write_whole
from ...core.units import duration, megabytes, number, percent
from ...records.models import ModelEntry
from . import plots
from .front import front_lines, size_plot, time_plot
from .retrieval import heat_map, memory_plot, retrieval_lengths, retrieval_lines
from .schema import Report
from .tasks import task_lines

ORDER = ("base", "pruned", "healed", "recovered", "merged")


def write_report(report: Report, page: str, folder: Path) -> list[Path]:
    """Write report.json and report.html, its page, into a run's folder; returns both paths."""
    texts = {"report.json": to_json(report), "report.html": page}
    written = []
    for name, text in texts.items():
        write_whole(folder / name, text)
        written.append(folder / name)
    return written


def to_json(report: Report) -> str:
    return json_text(report.model_dump())


def render(report: Report) -> str:
    """The page; everything that comes from data is escaped."""
    return template("page.html.j2").render(
        report=report,
        headline=headline(report),
        students=students(report),
        front=front_lines(report.models),
        tasks=task_lines(report.models),
        retrieval=retrieval_lines(report.models),
        lengths=retrieval_lengths(report.models),
        total_seconds=sum(stage.seconds for stage in report.stages),
        longest=max((stage.seconds for stage in report.stages), default=1.0) or 1.0,
        figures={
            "importance": plots.importance_plot(report),
            "curve": plots.curve_plot(report),
            "quality": plots.quality_plot(report),
            "front_size": size_plot(report),
            "front_time": time_plot(report),
            "loss": plots.loss_plot(report),
            "heldout": plots.heldout_plot(report),
            "depths": plots.depth_plot(report),
            "sort": plots.sort_plot(report),
            "retain": plots.retain_plot(report),
            "passkey": heat_map(report, "passkey"),
            "keys": heat_map(report, "keys"),
            "kv_memory": memory_plot(report),
        },
        bench=bench_section(report.bench) if report.bench else None,
    )


def bench_section(bench: dict[str, Any]) -> str:
    """The part of a page that shows what `compress bench` found."""
    return template("bench.html.j2").render(bench=bench, plot=plots.speed_plot(bench["depths"]))


def bench_page(bench: dict[str, Any]) -> str:
    """The same as a page of its own."""
    return template("bench_page.html.j2").render(name=bench["name"], section=bench_section(bench))


def template(name: str, package: str = "compress.pipeline.report") -> Any:
    """A page or a part of one, a file of a package of ours; what is filled in is escaped."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"mb": megabytes, "num": number, "pct": percent, "duration": duration}
    return environment.from_string(files(package).joinpath(name).read_text("utf-8"))


def smallest_artifact(report: Report) -> ModelEntry | None:
    """The smallest exported file whose perplexity is within a tenth of its checkpoint's, else the best one."""
    exported = [m for m in report.models if m.role.startswith(("gguf-", "onnx-"))]
    checkpoint = final_model(report)
    good = [m for m in exported if checkpoint and m.perplexity <= 1.1 * checkpoint.perplexity]
    if good:
        return min(good, key=lambda m: m.bytes)
    return min(exported, key=lambda m: m.perplexity, default=None)


def final_model(report: Report) -> ModelEntry | None:
    """The last torch model that was made; of a sorted one its greatest depth."""
    made = torch_models(report)
    return made[-1] if made else None


def torch_models(report: Report) -> list[ModelEntry]:
    """The torch models in the order in which they were made, depths ascending."""
    made = [m for role in ORDER if (m := report.model(role)) is not None]
    return made + sorted((m for m in report.models if m.role.startswith("depth-")), key=lambda m: m.blocks)


def headline(report: Report) -> list[dict[str, str]]:
    """The main results, as label, figure and comparison."""
    base, final, small = report.model("base"), final_model(report), smallest_artifact(report)
    if base is None or final is None:
        return []
    last = small or final
    changed = last if final is base else final  # a recipe may only export
    others = [base] + [m for m in torch_models(report) if m.role not in ("base", changed.role)]
    cards = [
        {
            "label": "size",
            "figure": megabytes(last.bytes),
            "note": f"{last.role}; {base.bytes / last.bytes:.1f}× smaller than the base's {megabytes(base.bytes)}",
        },
        {
            "label": "perplexity",
            "figure": number(changed.perplexity),
            "note": f"{changed.role}; " + ", ".join(f"{m.role} {number(m.perplexity)}" for m in others),
        },
    ]
    if last.tokens_per_second and base.tokens_per_second:
        cards.append(
            {
                "label": "decoding",
                "figure": f"{last.tokens_per_second:.0f} tokens/s",
                "note": f"{last.role} in {last.runtime}; base in torch {base.tokens_per_second:.0f} tokens/s",
            }
        )
    if changed.top1_agreement is not None:
        cards.append(
            {
                "label": "same next token as the unpruned model",
                "figure": percent(changed.top1_agreement),
                "note": f"{changed.role}, KL {number(changed.kl_to_base)} nats",
            }
        )
    return cards


def students(report: Report) -> list[dict[str, Any]]:
    """Variants and their merge side by side: what each is, its held-out figures, and whether it was selected.

    With a merge the figures are those of the saved checkpoints, else those that training ended with.
    """
    if report.variants is None:
        return []
    entries = report.variants.variants
    chosen = (report.merge or report.variants).chosen
    trained = {
        entry.name: f"{entry.objective}, rows {' to '.join(percent(part) for part in entry.rows)}, "
        f"seed {entry.seed}, {entry.steps} steps"
        for entry in entries
    }
    if report.merge is None:
        figures = {entry.name: entry.best for entry in entries}
    else:
        figures = {entry.name: entry for entry in report.merge.models}
        trained["merge"] = f"{report.merge.method} of {', '.join(report.merge.parents)}"
    return [
        {
            "name": name,
            "what": trained.get(name, "what they were trained from"),
            "kl": entry.eval_kl,
            "perplexity": entry.eval_perplexity,
            "kept": name == chosen,
        }
        for name, entry in figures.items()
    ]
