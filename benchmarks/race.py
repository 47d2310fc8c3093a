"""Times of calls that take turns, so that a busy machine slows all of them alike, and what a call does, counted."""

import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Call = Callable[[], object]

LEAST_ROUNDS = 3
VIEWS_AND_LOOKS = ("detach", "alias", "empty", "empty_like", "lift_fresh")
"""Ops that touch no element and have no alias in their schema."""
ONLY_WRITES = ("copy_", "zero_", "fill_", "combine_", "_foreach_zero_")
"""Ops that write their first argument without reading it; of others the results count beside the inputs."""
HOST_READS = ("_local_scalar_dense", "equal", "nonzero", "is_nonzero")


def race(calls: Mapping[str, Call], threads: int, seconds: float, most_rounds: int = 60) -> dict[str, list[float]]:
    """Seconds of each call in each round; every round runs each once, in order, after one round that does not count.

    On one thread the thread's own time counts, without what other processes take in between; on more the wall clock's. A call
    that takes more than its share of ``seconds`` leaves after ``LEAST_ROUNDS`` rounds.
    """
    clock = time.thread_time if threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in calls}
    share = seconds / len(calls)
    for call in calls.values():
        call()
    for _ in range(most_rounds):
        running = [name for name, own in times.items() if len(own) < LEAST_ROUNDS or sum(own) < share]
        if not running or (sum(map(sum, times.values())) > seconds and all(len(own) >= LEAST_ROUNDS for own in times.values())):
            break
        for name in times:
            if name in running or name.startswith("read"):  # the reads go on: they are what the others are compared with
                start = clock()
                calls[name]()
                times[name].append(clock() - start)
    return times


@dataclass(frozen=True)
class Timing:
    """Of one call among others that take turns with reads."""

    median: float
    minimum: float
    reads: float
    """Median over the rounds of the time over that of the fastest read of the same round."""
    read_seconds: float
    """Median over the rounds of the fastest read."""


def timings(times: Mapping[str, list[float]]) -> dict[str, Timing]:
    """Of every call but the reads, whose names start with "read"."""
    fastest = [min(own) for own in zip(*(own for name, own in times.items() if name.startswith("read")), strict=True)]
    read = statistics.median(fastest)
    return {
        name: Timing(
            statistics.median(own), min(own), statistics.median(t / r for t, r in zip(own, fastest, strict=False)), read
        )
        for name, own in times.items()
        if not name.startswith("read")
    }


@dataclass(frozen=True)
class Counted:
    """What one call does."""

    launches: int
    """Ops that touch elements; each is a kernel launch or more on a GPU."""
    moved: int
    """Bytes of their inputs and outputs."""
    host_reads: int
    """Device values that the host waits for."""
    peak: int
    """Bytes allocated at once beyond those before the call."""


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.launches = self.moved = self.host_reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        aliases = [r.alias_info for r in func._schema.returns]
        is_view = any(a is not None and not a.is_write for a in aliases)
        if name in HOST_READS:
            self.host_reads += 1
        elif not is_view and name not in VIEWS_AND_LOOKS:
            self.launches += 1
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            if name not in ONLY_WRITES:
                tensors += [t for t in tree_leaves(result) if isinstance(t, Tensor)]
            self.moved += sum(
                {(t.data_ptr(), t.nbytes): t.nbytes for t in tensors}.values()
            )  # a matrix and its transpose: once
        return result


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines that the profiler writes to the process's stderr whenever it starts and stops."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def peak_bytes(call: Call) -> int:
    """The most that was allocated at a time while ``call`` ran, beyond what was there before."""
    with _quiet(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    del kept  # not before the profiler stopped
    return max(itertools.accumulate((e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), initial=0))


def count(call: Call) -> Counted:
    """Runs the call twice: under a counter of ops, and under the profiler of memory."""
    with _Counter() as counter:
        call()
    return Counted(counter.launches, counter.moved, counter.host_reads, peak_bytes(call))
