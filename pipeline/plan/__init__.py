"""`compress plan`: estimates for a recipe from configuration files, and what to change if it does not fit."""

from .devices import Device, find_device, parse_size
from .fit import Change, smallest_change
from .geometry import read_geometry
from .plan import Plan, StagePlan, make_plan, planned_memory, settings
from .show import show_plan

__all__ = [
    "Change",
    "Device",
    "Plan",
    "StagePlan",
    "find_device",
    "make_plan",
    "parse_size",
    "planned_memory",
    "read_geometry",
    "settings",
    "show_plan",
    "smallest_change",
]
