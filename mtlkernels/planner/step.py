"""A step of training on one rank, gone through without running it: what it computes, moves, sends, launches and holds."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ..optim.host import BLOCK_BYTES

Shape = tuple[int, ...]
Sharding = Literal["none", "ddp", "fsdp"]

TABLE_BYTES = 32_684
"""Of a launch's table of pointers, of which a tensor with q of them takes 8 q + 12 (csrc/common/launch_plan.h)."""
BUCKET = 25 * 2**20
"""Bytes of a row that one collective moves (:class:`mtlkernels.distributed.Replicated`); and of DistributedDataParallel's."""
FIRST_BUCKET = 2**20
"""Of DistributedDataParallel's first bucket."""
ONE_READ_TASKS = 8
"""So many tasks ``gram_combine_`` takes in one read on CUDA."""
FACTORS = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2}
"""How many times (n - 1) / n of a tensor a rank sends in a ring."""
STATES = {"sgd": 0, "momentum": 1, "adam": 2, "adamw": 2}
"""Torch optimizer -> tensors like the parameter in its state."""
FINISH_POINTERS = {"sgd": 4, "momentum": 4, "adam": 6, "adamw": 6}
"""Torch optimizer -> pointers of a tensor in its fused finish, besides those of the gradients."""
MASTER_BYTES = 50
"""Bytes for each parameter that :class:`mtlkernels.MasterWeights` reads and writes around the step of the float32 copies."""
ACTIVATIONS, WORK, WIDENED = 16, 5, 4
"""Elements for each token and unit of width: what a block keeps for its backward pass, and what that pass needs besides.

A block keeps the input and output of both norms (4), queries, keys and values (3), the attention's result (1), and, four times
as wide, what goes into the activation function and comes out of it (8): Korthikanti et al. 2022, section 4.1, without dropout
and with an attention that keeps no scores. The pass needs the gradients of the block's result (1) and of the wide layer (4);
as much again for what went into the function, unless its result makes room because the graph is not kept.
"""


@dataclass(frozen=True)
class Setting:
    """What is trained, in which way, and with how many ranks.

    Attributes:
        blocks: the shared parameters' shapes, block by block from the input to the losses: what ``fully_shard`` gathers, and
            ``cuts`` cut, at a time.
        heads: those of each of the K tasks' own parameters; an empty one where the tasks differ in their losses only.
        tokens: of a rank and step; samples where the model is none of a language.
        width: elements of a token between two blocks.
        element: bytes of a parameter, gradient, activation and state.
        optimizer: a key of :data:`STATES`.
        master: whether ``MasterWeights`` keeps float32 copies of 16-bit parameters, and float32 states.
        gpus: data-parallel ranks.
        sharding: ``"ddp"``: every rank holds all parameters; ``"fsdp"``: its part of them. ``"none"`` with one rank.
        checkpointing: whether a block keeps its input only, and runs again in each backward pass
            (``checkpoint(..., use_reentrant=False)``).
        activation_bytes: that all blocks keep for the backward pass; None: those of transformer blocks (:data:`ACTIVATIONS`).
        sub_batch: part of the batch that ``gram_losses`` are of.
        update_every: n of that option.
    """

    blocks: Sequence[Sequence[Shape]]
    heads: Sequence[Sequence[Shape]]
    tokens: int
    width: int
    element: int = 2
    optimizer: str = "adamw"
    master: bool = False
    gpus: int = 1
    sharding: Sharding = "none"
    checkpointing: bool = False
    activation_bytes: float | None = None
    sub_batch: float = 0.25
    update_every: int = 4

    @property
    def tasks(self) -> int:
        return len(self.heads)

    @property
    def shared(self) -> list[Shape]:
        return [shape for block in self.blocks for shape in block]

    @property
    def own(self) -> list[Shape]:
        """Of all heads, one task's after the other's."""
        return [shape for head in self.heads for shape in head]

    @property
    def representation(self) -> int:
        """Bytes of what one block passes on to the next, and the last one to the heads."""
        return self.tokens * self.width * self.element

    @property
    def block_activations(self) -> float:
        """Bytes that a block keeps from the forward to the backward pass."""
        if self.activation_bytes is not None:
            return self.activation_bytes / len(self.blocks)
        return self.representation * (1 if self.checkpointing else ACTIVATIONS)

    def work(self, retain: bool) -> float:
        """Bytes that come and go in a block's backward pass."""
        again = self.checkpointing and self.activation_bytes is None
        return self.representation * (WORK + (ACTIVATIONS if again else WIDENED if retain else 0))

    def bytes_of(self, shapes: Iterable[Shape]) -> int:
        return sum(map(math.prod, shapes)) * self.element

    def padded(self, shapes: Iterable[Shape]) -> int:
        """Bytes of whole tensors as collectives move them: n equal slices of each."""
        if self.sharding == "fsdp":  # of the first dimension
            return sum(_up(shape[0], self.gpus) * math.prod(shape[1:]) for shape in shapes) * self.element
        step = 16 * self.gpus if self.sharding == "ddp" else 1  # bytes: every slice is aligned
        return sum(_up(math.prod(shape) * self.element, step) for shape in shapes)

    def part(self, shapes: Iterable[Shape]) -> float:
        """Bytes of a row of their gradients that a rank works on."""
        return self.padded(shapes) / self.gpus

    def kept(self, shapes: Iterable[Shape]) -> float:
        """Bytes of the parameters, or of tensors like them, that a rank holds."""
        return self.part(shapes) if self.sharding == "fsdp" else self.bytes_of(shapes)

    @property
    def state_bytes(self) -> int:
        """Of each parameter in the optimizer's state."""
        states = STATES[self.optimizer]
        return 4 * (1 + states) if self.master else states * self.element

    def buckets(self, shapes: Iterable[Shape], limit: int = BUCKET) -> list[list[Shape]]:
        """What goes in one collective each: tensors up to ``limit`` bytes together, or one tensor."""
        result: list[list[Shape]] = []
        filled = limit
        for shape in shapes:
            size = self.bytes_of([shape])
            if filled + size > limit:
                result.append([])
                filled = 0
            result[-1].append(shape)
            filled += size
        return result


class Step:
    """What a rank does in a step, added up while a mode (:mod:`mtlkernels.planner`) goes through it in order.

    Attributes:
        flops: operations of all passes.
        moved: bytes of device memory that this package's ops read and write.
        stepped: those that the torch optimizer's step does.
        launches: of this package's kernels.
        returned: bytes of rows that come back from the host's memory.
        row: bytes that are kept of a gradient of a shared parameter as soon as it is there, in parts of its own.
        collectives: (kind, bytes of the whole tensor) -> how many.
        held: bytes that are there at the moment.
        peak: the most that were.
    """

    def __init__(self, setting: Setting) -> None:
        self.s = setting
        self.flops = self.moved = self.stepped = self.launches = self.returned = 0.0
        self.row = 1.0
        self.collectives: Counter[tuple[str, int]] = Counter()
        every = [*setting.shared, *setting.own]
        self.held = self.peak = setting.kept(every) * (1 + setting.state_bytes / setting.element)
        self._flying = 0.0

    def sent(self) -> float:
        """Bytes that the rank sends in rings."""
        moved = sum(FACTORS[kind] * size * count for (kind, size), count in self.collectives.items())
        return moved * (self.s.gpus - 1) / self.s.gpus

    def hold(self, size: float) -> None:
        """Takes memory; gives it back where ``size`` is negative."""
        self.held += size
        self.peak = max(self.peak, self.held)

    def touch(self, size: float) -> None:
        """Takes memory and gives it back at once."""
        self.hold(size)
        self.hold(-size)

    def collective(self, kind: str, size: float) -> None:
        if self.s.gpus > 1:
            self.collectives[kind, int(size)] += 1

    # --- passes ----------------------------------------------------------------------------------------------------------

    def forward(self, part: float = 1.0) -> None:
        """A forward pass of a part of the batch, which keeps what the backward pass needs."""
        s = self.s
        self.flops += 2 * s.tokens * part * _elements([*s.shared, *s.own])
        for block in [*s.blocks, *s.heads]:
            self.prefetch(block)
        self.hold(part * s.block_activations * len(s.blocks))

    def backward(self, tasks: Sequence[int], retain: bool = False, part: float = 1.0, own: bool = True) -> None:
        """A backward pass of some tasks' losses, which leaves a gradient of the shared parameters and of the tasks' heads.

        Args:
            tasks: from whose heads it comes.
            retain: whether the graph is kept for another pass.
            part: of the batch.
            own: whether the heads' own gradients are made in it.
        """
        for task in tasks:
            self.head(task, part, own)
        for block in self.s.blocks[::-1]:
            self.block(block, retain, part)

    def head(self, task: int, part: float = 1.0, own: bool = True) -> None:
        """The part of a backward pass above the blocks, of one task."""
        s, head = self.s, self.s.heads[task]
        self.flops += (4 if own else 2) * s.tokens * part * _elements(head)
        self.prefetch(head)
        if own:
            self._reduce(head)

    def block(self, block: Sequence[Shape], retain: bool, part: float = 1.0) -> None:
        """The part of a backward pass that goes through one block."""
        s = self.s
        self.flops += 4 * s.tokens * part * _elements(block)
        if s.checkpointing:  # the forward pass again, but for the last layer, whose result nobody needs
            self.flops += 2 * s.tokens * part * _elements(block[:-1])
        self.prefetch(block)
        # Sharded: its parameters and those of the next one, gathered, and the gradients of the one before, on their way.
        whole = s.bytes_of(block) if s.sharding == "fsdp" else 0
        self.touch(part * s.work(retain) + 3 * whole)
        if not retain:
            self.hold(-part * s.block_activations)
        if self.row < 1:
            self.touch(max((s.bytes_of([shape]) for shape in block), default=0))
        self._reduce(block, self.row)

    def prefetch(self, block: Sequence[Shape]) -> None:
        """Gathers the parameters of a block that is sharded."""
        if self.s.sharding == "fsdp" and block:
            self.collective("all_gather", self.s.padded(block))

    def _reduce(self, block: Sequence[Shape], row: float = 1.0) -> None:
        """The gradients of a block; under ``fully_shard`` what a rank gets of them."""
        whole = self.s.bytes_of(block)
        if self.s.sharding != "fsdp" or not block:
            self.hold(row * whole)
            return
        self.touch(3 * whole + self.s.padded(block))  # both blocks' parameters, and the gradients with their copy
        self.collective("reduce_scatter", self.s.padded(block))
        self.hold(self.s.part(block))

    # --- rows of gradients -----------------------------------------------------------------------------------------------

    def scatter(self, shapes: Sequence[Shape]) -> None:
        """A row of plain parameters' gradients on its way to the ranks, while the next pass runs; its parts stay."""
        if self.s.sharding != "ddp" or not shapes:
            return
        self.wait()
        self._flying = self.s.padded(shapes)
        self.hold(self._flying + self.s.part(shapes))
        for bucket in self.s.buckets(shapes):
            self.collective("reduce_scatter", self.s.padded(bucket))
        self.hold(-self.s.bytes_of(shapes))

    def wait(self) -> None:
        self.hold(-self._flying)
        self._flying = 0.0

    def drop(self, rows: int, shapes: Sequence[Shape]) -> None:
        """Gives rows of gradients back."""
        self.hold(-rows * self.s.part(shapes))

    def gram(self, rows: int, shapes: Sequence[Shape], there: int | None = None) -> None:
        """Reads rows of gradients. ``there``: how many of them a tensor has, where the others are None."""
        self._launch(shapes, rows, 1)
        self.moved += (rows if there is None else there) * self.s.part(shapes)

    def combine(self, rows: int, shapes: Sequence[Shape], there: int | None = None) -> None:
        """Reads rows of gradients and writes their combination where the first one was."""
        self._launch(shapes, rows + 2)
        self.moved += ((rows if there is None else there) + 1) * self.s.part(shapes)

    def at_representation(self, rows: int) -> None:
        """The Gram and the combination of gradients at what the heads are given, of which each rank has its own."""
        whole = [(self.s.tokens, self.s.width)]
        self._launch(whole, rows, 1)
        self._launch(whole, rows + 2)
        self.moved += (2 * rows + 1) * self.s.representation

    def gram_combine(self, rows: int, shapes: Sequence[Shape]) -> None:
        """Both in one read, where registers hold what it takes."""
        if rows > ONE_READ_TASKS:
            self.gram(rows, shapes)
            self.combine(rows, shapes)
        else:
            self._launch(shapes, rows + 2, 1)
            self.moved += (rows + 1) * self.s.part(shapes)

    def from_host(self, rows: int, shapes: Sequence[Shape], written: int = 0) -> None:
        """The Gram, or the combination where it is ``written``, of rows that come back from the host, two blocks at a time."""
        row = self.s.part(shapes)
        self.touch(min(2 * BLOCK_BYTES, rows * row))
        self.returned += rows * row
        self.moved += (rows + written) * row
        self.launches += math.ceil(rows * row / BLOCK_BYTES) * (1 if written else 2)

    def finish(self, rows: int, shapes: Sequence[Shape], there: int | None = None) -> None:
        """Reads rows of gradients, parameters and state, and writes the latter two."""
        states = STATES[self.s.optimizer]
        self._launch(shapes, rows + FINISH_POINTERS[self.s.optimizer])
        self.moved += ((rows if there is None else there) + 2 + 2 * states) * self.s.part(shapes)

    def _launch(self, shapes: Sequence[Shape], pointers: int, more: int = 0) -> None:
        if shapes:
            self.launches += math.ceil(len(shapes) / (TABLE_BYTES // (8 * pointers + 12))) + more

    # --- what decides, and the update ------------------------------------------------------------------------------------

    def decide(self, numbers: int, weights: bool = True) -> None:
        """The all-reduce of Grams and losses, and the kernel that makes ``weights`` of them."""
        self.collective("all_reduce", 8 * numbers)
        self.launches += weights

    def gather(self, shapes: Sequence[Shape]) -> None:
        """Every rank's part of the update, of plain parameters."""
        if self.s.sharding != "ddp":
            return
        # A bucket is filled up with what a rank has of each tensor, 16 bytes at least.
        parts = self.s.buckets([(int(self.s.part([shape])) // self.s.element,) for shape in shapes], BUCKET // self.s.gpus)
        for bucket in parts:
            self.collective("all_gather", self.s.bytes_of(bucket) * self.s.gpus)
        self.touch(self.s.part(shapes) + 2 * self.s.padded(shapes))
        self.hold(self.s.bytes_of(shapes))

    def optimizer(self, shapes: Sequence[Shape]) -> None:
        """The torch optimizer's step: the gradient, and parameter and state there and back."""
        s = self.s
        elements, moved = s.kept(shapes) / s.element, 3 + 2 * STATES[s.optimizer]
        if s.master:
            self.touch(4 * elements)  # float32 gradients
            self.stepped += (4 * moved + MASTER_BYTES) * elements
        else:
            self.stepped += moved * s.element * elements


def _elements(shapes: Iterable[Shape]) -> int:
    return sum(map(math.prod, shapes))


def _up(value: int, step: int) -> int:
    """The next multiple of ``step``."""
    return -(-value // step) * step
