"""What a step of multi-task training takes on named hardware, for every way to take it: ``python -m mtlkernels plan``.

Nothing runs and nothing is measured: each mode goes through its step and adds up what it computes, moves, sends, launches and
holds; times are lower bounds from datasheets. ``tests/test_planner_counted.py`` compares with what small runs really do.
"""

from .modes import MODES, Mode, Plan, plan, plans
from .step import Setting, Step

__all__ = ["MODES", "Mode", "Plan", "Setting", "Step", "plan", "plans"]
