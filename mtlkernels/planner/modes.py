"""The ways to take a step, and what each of them takes."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..hardware import Gpu
from ..optim.choose import PLAIN
from .step import BUCKET, FIRST_BUCKET, Setting, Step


def _plain(step: Step) -> None:
    """sum(losses).backward(), and the torch optimizer."""
    s, every = step.s, [*step.s.shared, *step.s.own]
    step.forward()
    step.backward(range(s.tasks))
    if s.sharding == "ddp":
        limit, size = FIRST_BUCKET, 0  # a bucket ends with the tensor that fills it
        for shape in every[::-1]:
            size += s.bytes_of([shape])
            if size >= limit:
                step.collective("all_reduce", size)
                limit, size = BUCKET, 0
        if size:
            step.collective("all_reduce", size)
    step.optimizer(every)


def _stored(step: Step) -> None:
    s, k = step.s, step.s.tasks
    _task_gradients(step)
    step.gram(k, s.shared)
    _decide(step, k * k)
    step.combine(k, s.shared)
    _update(step, k)


def _fused(step: Step) -> None:
    s, k = step.s, step.s.tasks
    _task_gradients(step)
    step.gram(k, s.shared)
    _decide(step, k * k)
    step.finish(k, s.shared)
    step.finish(k, s.own, there=1)


def _previous(step: Step) -> None:
    s, k = step.s, step.s.tasks
    _task_gradients(step)
    step.gram_combine(k, s.shared)
    _decide(step, k * k)
    _update(step, k)


def _bfloat16(step: Step) -> None:
    s, k = step.s, step.s.tasks
    step.row = min(2, s.element) / s.element
    _task_gradients(step)
    rows = Step(replace(s, element=min(2, s.element)))  # as they are read
    rows.gram(k, s.shared)
    rows.combine(k, s.shared)
    step.moved += rows.moved
    step.launches += rows.launches
    _decide(step, k * k)
    step.hold((1 - k * step.row) * s.part(s.shared))  # one of them, widened
    step.optimizer([*s.shared, *s.own])


def _host(step: Step) -> None:
    s, k = step.s, step.s.tasks
    step.row = 0.0
    _task_gradients(step)
    step.from_host(k, s.shared)
    _decide(step, k * k)
    step.hold(s.bytes_of(s.shared))
    step.from_host(k, s.shared, written=1)
    step.optimizer([*s.shared, *s.own])


def _online(step: Step) -> None:
    s, k = step.s, step.s.tasks
    step.forward()
    for task in range(k):
        step.backward([task], retain=task < k - 1)
        there = min(task + 1, 2)  # the sum of those before, and this one
        step.gram(2, s.shared, there)
        step.decide(0)
        step.combine(2, s.shared, there)
        step.drop(there - 1, s.shared)
    _weighted_update(step)


def _streamed(step: Step) -> None:
    s, k = step.s, step.s.tasks
    step.forward()
    for task in range(k):
        step.head(task)
    step.hold(k * s.representation)  # K gradients at a cut
    for block in s.blocks[::-1]:
        for _ in range(k):
            step.block(block, retain=True)
            step.hold(s.representation)
        step.hold(-k * s.representation)
        for _ in range(k):
            step.scatter(block)
        step.wait()
        step.gram(k, block)
        step.drop(k, block)
    step.hold(-k * s.representation)
    step.decide(k * k + k)
    step.backward(range(k), own=False)
    _weighted_update(step)


def _representation(step: Step) -> None:
    s, k = step.s, step.s.tasks
    step.forward()
    for task in range(k):
        step.head(task)
    step.hold(k * s.representation)
    step.at_representation(k)
    step.decide(k * k + k)
    step.hold(-(k - 1) * s.representation)
    for block in s.blocks[::-1]:
        step.block(block, retain=False)
    step.hold(-s.representation)
    _weighted_update(step)


def _sub_batch(step: Step) -> None:
    s, k = step.s, step.s.tasks
    step.forward()
    step.forward(s.sub_batch)
    for task in range(k):
        with_head = s.sharding == "fsdp"  # of whole backward passes
        step.backward([task], task < k - 1, s.sub_batch, own=with_head)
        step.drop(with_head, s.heads[task])
        step.scatter(s.shared)
    step.prefetch([*s.blocks, *(head for head in s.heads if head)][-1])  # what the batch's forward pass ended with
    step.wait()
    step.gram(k, s.shared)
    step.decide(k * k + k)
    step.drop(k, s.shared)
    _weighted_backward(step)
    _weighted_update(step)


def _held(step: Step) -> None:
    """A step between updates of the weights."""
    step.forward()
    _weighted_backward(step)
    _weighted_update(step)


def _loss_only(step: Step) -> None:
    s, every = step.s, [*step.s.shared, *step.s.own]
    step.forward()
    step.decide(s.tasks * (s.tasks + 1), weights=False)
    step.backward(range(s.tasks))
    step.scatter(every)
    step.wait()
    step.gram(1, every)
    step.decide(1, weights=False)
    step.combine(1, every)
    step.gather(every)
    step.drop(s.sharding == "ddp", every)
    step.optimizer(every)


# --- what they share ----------------------------------------------------------------------------------------------------------


def _task_gradients(step: Step) -> None:
    """K backward passes."""
    s = step.s
    step.forward()
    for task in range(s.tasks):
        step.backward([task], retain=task < s.tasks - 1)
        step.scatter([*s.shared, *s.heads[task]])
    step.wait()


def _decide(step: Step, gram: int, weights: bool = True) -> None:
    """The heads' Gram, and the all-reduce: of that, the shared parameters' Gram and the losses."""
    s, k = step.s, step.s.tasks
    step.gram(k, s.own, there=1)
    step.decide(gram + (k * k if s.own else 0) + k, weights)


def _weighted_backward(step: Step) -> None:
    """One backward pass of the weighted losses, and the heads' own gradients."""
    s, tasks = step.s, range(step.s.tasks)
    if s.sharding == "fsdp" and s.own:  # whose graph does not have them as leaves: a whole pass more, of the sum of the losses
        step.backward(tasks, retain=True)
        step.backward(tasks)
        step.drop(1, [*s.shared, *s.own])
    else:
        step.backward(tasks)


def _weighted_update(step: Step) -> None:
    """The update of one gradient of the weighted losses, which is clipped, or shows that it is not finite."""
    s = step.s
    for head in s.heads:
        step.scatter(head)
    step.scatter(s.shared)
    step.wait()
    step.gram(1, s.shared)
    _decide(step, 1, weights=False)
    step.combine(1, s.shared)
    _update(step, 1)


def _update(step: Step, rows: int) -> None:
    """From combined gradients in place of the first of ``rows`` to the torch optimizer's step."""
    s, every = step.s, [*step.s.shared, *step.s.own]
    replicated = s.sharding == "ddp"
    if replicated:  # whose parts are sums over the ranks, and become means
        step.combine(s.tasks, s.own, there=1)
    step.gather(every)
    step.drop(rows if replicated else rows - 1, s.shared)
    step.drop(replicated, s.own)
    step.optimizer(every)


class Mode(NamedTuple):
    """A way to take a step.

    ``run`` goes through it; ``between``, where there is one, goes through those of the ``update_every`` - 1 steps that follow.
    """

    how: str
    """What chooses it."""
    weights: str
    """What they are made from."""
    run: Callable[[Step], None]
    between: Callable[[Step], None] | None = None
    refused: tuple[str, ...] = ()
    """What rules it out: ways of sharding, and ``"master"``."""

    def reason(self, setting: Setting) -> str | None:
        """What rules it out in the setting; None where nothing does."""
        there = [setting.sharding, *(["master"] if setting.master else [])]
        return next((name for name in there if name in self.refused), None)


MODES = {
    PLAIN: Mode("a torch optimizer", "none", _plain),
    "stored": Mode("step(losses)", "all gradients of the step", _stored),
    "stored, fused": Mode("fused=True", "all gradients of the step", _fused, refused=("ddp", "master")),
    "previous": Mode('weights_from="previous"', "all gradients of the step before", _previous),
    "bfloat16": Mode('rows="bfloat16"', "the same, rounded to 2^-9", _bfloat16, refused=("ddp", "fsdp")),
    "host": Mode('rows="host"', "all gradients of the step", _host, refused=("ddp", "fsdp")),
    "online": Mode('rows="online", PCGrad only', "a gradient and the sum of those before", _online, refused=("ddp", "fsdp")),
    "streamed": Mode("cuts= behind every block", "all gradients of the step", _streamed, refused=("fsdp",)),
    "representation": Mode("representation=", "gradients at what the heads are given", _representation, refused=("fsdp",)),
    "sub-batch": Mode("gram_losses=", "gradients of a part of the batch", _sub_batch),
    "update_every": Mode("update_every=", "all gradients of one step in n", _stored, between=_held),
    "loss-only": Mode('"uncertainty", "dwa", ...', "the losses", _loss_only),
}
"""Name -> mode. A new one is a function of a :class:`Step` and a line here."""


# --- what they take -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a rank does in a step of a mode; where steps differ, the mean over them, but for the peak.

    Attributes:
        mode: a key of :data:`MODES`.
        flops: operations of forward and backward passes.
        moved: bytes of device memory that this package's ops read and write.
        stepped: those that the torch optimizer's own step does.
        returned: bytes of rows that come back from the host's memory; half as many go there.
        launches: of this package's kernels that read gradients, and of the one that makes weights.
        collectives: (kind, bytes of the whole tensor) -> how many.
        sent: bytes that the rank sends in rings.
        peak: bytes of parameters, optimizer state, activations and gradients that are there at once.
    """

    mode: str
    flops: float
    moved: float
    stepped: float
    returned: float
    launches: float
    collectives: dict[tuple[str, int], float]
    sent: float
    peak: float

    def times(self, setting: Setting, gpu: Gpu, node: int) -> dict[str, float]:
        """Seconds that each resource takes at least. The GPU does the first two one after the other, the others beside them."""
        rate = gpu.half_flops if setting.element == 2 else gpu.float_flops
        # Between nodes every GPU of a node takes its share of what the ring carries.
        link = gpu.node_link if setting.gpus <= node else min(gpu.node_link, node * gpu.network)
        return {
            "compute": self.flops / rate,
            "memory": (self.moved + self.stepped) / gpu.bandwidth,
            "network": self.sent / link,
            "host": self.returned / gpu.host_link,
        }


def plan(setting: Setting, mode: str) -> Plan:
    """Goes through the mode's step.

    Raises:
        ValueError: a mode that the setting rules out.
    """
    own = MODES[mode]
    reason = own.reason(setting)
    if reason is not None:
        raise ValueError(f"mode is {mode!r}, which {reason!r} rules out; pass one of the others.")
    steps = [Step(setting)]
    own.run(steps[0])
    if own.between is not None:
        for _ in range(setting.update_every - 1):
            steps.append(Step(setting))
            own.between(steps[-1])
    collectives = sum((step.collectives for step in steps), Counter())
    numbers = zip(*((t.flops, t.moved, t.stepped, t.returned, t.launches, t.sent()) for t in steps), strict=True)
    flops, moved, stepped, returned, launches, sent = (sum(values) / len(steps) for values in numbers)
    mean = {kind: count / len(steps) for kind, count in collectives.items()}
    return Plan(mode, flops, moved, stepped, returned, launches, mean, sent, max(step.peak for step in steps))


def plans(setting: Setting) -> list[Plan]:
    """Those of every mode that the setting allows."""
    return [plan(setting, name) for name, mode in MODES.items() if mode.reason(setting) is None]
