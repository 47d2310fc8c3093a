"""Groups of tasks from affinities: clusters, thresholds, the grouping program, network selection, and an order of the tasks.

All but :func:`affinity_propagation` are host work: a matrix on a device is read once. Groups are task indices, ascending, by
their first task.
"""

from .common import Groups, Selection
from .gains import transfer_gains
from .order import task_order
from .program import principled_groups
from .propagation import affinity_propagation
from .selection import select_networks
from .threshold import threshold_groups

__all__ = [
    "Groups",
    "Selection",
    "affinity_propagation",
    "principled_groups",
    "select_networks",
    "task_order",
    "threshold_groups",
    "transfer_gains",
]
