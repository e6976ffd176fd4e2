"""A plan as tables."""

from __future__ import annotations

import shutil

from rich import box
from rich.console import Console
from rich.table import Table

from ...core.cost import PARTS
from ...core.units import duration, megabytes
from ..stages import STAGES
from .devices import Device
from .plan import Plan, StagePlan


def show_plan(plan: Plan, console: Console) -> None:
    """Print a plan: the stages, the parts of their memory, and what to change where one does not fit."""
    before, after = (_count(number) for number in (plan.parameters, plan.parameters_after))
    console.print(f"{plan.source}: {before} parameters in {plan.blocks[0]} blocks → {after} in {plan.blocks[1]}")
    console.print(_stages_table(plan))
    console.print("peak memory by part:")
    for stage in plan.stages:
        parts = stage.need.parts
        listed = ", ".join(f"{name} {megabytes(parts[name])}" for name in PARTS if name in parts)
        console.print(f"  {stage.name}: {listed}")
    for stage in plan.stages:
        if not stage.fits:
            console.print(_lack(stage, plan))
    hosts = [f"{stage.name} {megabytes(stage.need.host)}" for stage in plan.stages if stage.need.host]
    if hosts:
        console.print(f"host memory: {', '.join(hosts)}")
    if plan.memory is not None and all(stage.fits for stage in plan.stages):
        console.print(f"every stage fits in {megabytes(plan.memory)}")
    if plan.device is not None:
        console.print(_in_all(plan, plan.device))
        console.print(_assumptions(plan, plan.device))
    most = max(stage.need.scratch for stage in plan.stages) if plan.stages else 0
    scratch = f", of which {megabytes(most)} are temporary" if most else ""
    console.print(f"disk: {megabytes(plan.disk)}{scratch}; free here: {megabytes(shutil.disk_usage('.').free)}")


def _in_all(plan: Plan, device: Device) -> str:
    *others, last = (name for name, stage in STAGES.items() if stage.parallel)
    shared = f"{', '.join(others)} and {last}"
    cards = f", {plan.cards} cards sharing {shared}" if plan.cards > 1 else ""
    if plan.seconds is None:
        unknown = [stage.name for stage in plan.stages if stage.seconds is None]
        return f"total time on {device.name}{cards}: unknown; the recipe does not determine it for {', '.join(unknown)}"
    return f"total time on {device.name}{cards}: {spell(plan.seconds)}"


def _assumptions(plan: Plan, device: Device) -> str:
    reached = "measured" if device.measured else "assumed"
    host = ""
    if device.host is not None:
        host = (
            f"; on the host CPU {device.host.flops / 1e12:.3g} TFLOPS and {device.host.bandwidth / 1e9:.0f} GB/s "
            "(assumed)"
        )
    return (
        f"time: {device.reached:.0%} of {device.flops[plan.dtype] / 1e12:.3g} TFLOPS and "
        f"{device.reached_bandwidth:.0%} of {device.bandwidth / 1e9:.0f} GB/s are reached ({reached}){host}; every row "
        "has the maximum length; lm-eval tasks, downloads and loading are not included"
    )


def _stages_table(plan: Plan) -> Table:
    where = f"on {plan.device.name}" if plan.device else "on a CPU"
    title = f"{plan.name}: estimates {where} in {plan.dtype}"
    table = Table("stage", title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("peak memory", "disk", "scratch", "operations", *(["time"] if plan.device else [])):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    for stage in plan.stages:
        found = stage.need
        scratch = megabytes(found.scratch) if found.scratch else "–"
        cells = [stage.name, megabytes(found.peak), megabytes(found.disk), scratch, _operations(stage)]
        note = found.note if stage.fits else f"DOES NOT FIT; {found.note}"
        table.add_row(*cells, *([_time(stage)] if plan.device else []), note, style="" if stage.fits else "red")
    return table


def _lack(stage: StagePlan, plan: Plan) -> str:
    lacks = f"{stage.name} does not fit: it needs {megabytes(stage.need.needed)} of {megabytes(plan.memory)}"
    if stage.beside is not None:
        seconds = "" if stage.beside.seconds is None else f" and {spell(stage.beside.seconds)}"
        memory = megabytes(stage.beside.memory)
        return f"{lacks}; on the host CPU (--device cpu) it takes {memory} of memory{seconds}"
    if stage.change is None:
        return f"{lacks}, and no known change makes it fit"
    options = " ".join(f"--set {override}" for override in stage.change.overrides)
    return f"{lacks}; smallest change: {options} ({megabytes(stage.change.memory)})"


def _operations(stage: StagePlan) -> str:
    if stage.flops is None:
        return "?"
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if stage.flops >= size:
            return f"{stage.flops / size:.3g} {unit}"
    return f"{stage.flops / 1e6:.3g} M" if stage.flops else "–"


def _time(stage: StagePlan) -> str:
    return "?" if stage.seconds is None else spell(stage.seconds)


def spell(seconds: float) -> str:
    """A time; in hours and minutes from one hour on."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else duration(seconds)


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"
