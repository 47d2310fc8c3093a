"""Every kernel that the Triton backend can launch, compiled ahead of time and without a GPU."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..gradient_dropout import MODES
from . import (
    combine,
    excess_risk,
    finish,
    graddrop,
    gradient_dropout,
    gram,
    gram_combine,
    memory,
    perturb,
    priority,
    trimmed_mean,
)
from .launch import NVIDIA, TYPES, Chip

GPUS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
"""Name -> what Triton compiles for."""
CHIPS = dict.fromkeys(GPUS, NVIDIA) | {"gfx942": Chip(64, False)}


class Target(NamedTuple):
    """A kernel at one row class and dtype: what tells it apart from every other compiled kernel."""

    kernel: Any
    num_rows: int
    dtype: torch.dtype
    variant: str

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.kernel.fn.__name__}-{self.variant}-{dtype}-{self.num_rows}"

    def launch_options(self, chip: Chip = NVIDIA) -> tuple[dict[str, Any], dict[str, Any]]:
        """Constants and options, from the op's own table."""
        if self.kernel is gram.gram_finish:
            return gram.finish_meta(chip)
        if self.kernel is combine.combine_chunks:
            return combine.meta(self.num_rows, self.dtype, self.variant != "mix", chip, self.variant == "combine channels")
        if self.kernel is priority.priority_alphas:
            return priority.alphas_meta(self.num_rows, chip)
        if self.kernel in (priority.priority_products, priority.priority_results):
            constants, options = priority.meta(self.num_rows, self.dtype, chip)
            return constants | {"SLICE": priority.SLICE}, options
        if self.kernel is perturb.perturb_chunks:
            return perturb.meta(self.dtype, chip)
        if self.kernel is graddrop.graddrop_chunks:
            return graddrop.meta(self.num_rows, self.dtype, chip)
        if self.kernel is gradient_dropout.gradient_dropout_chunks:
            return gradient_dropout.meta(self.dtype, self.variant == "gaussian", chip)
        if self.kernel is trimmed_mean.trimmed_mean_chunks:
            return trimmed_mean.meta(int(self.variant.removeprefix("trim ")), self.dtype, chip)
        if self.kernel is finish.finish_chunks:
            return finish.meta(self.num_rows, self.dtype, self.variant == "adam", chip)
        if self.kernel is memory.memory_chunks:
            return memory.meta(self.dtype, chip)
        if self.kernel is excess_risk.excess_chunks:
            return excess_risk.meta(self.dtype, chip)
        if self.kernel is gram_combine.gram_combine_pairs:
            return gram_combine.meta(self.num_rows, self.dtype, chip)
        form = self.variant if self.variant in gram.FORMS else ""
        _, constants, options = gram.meta(self.num_rows, self.dtype, self.variant == "channels", chip, form=form)
        return constants, options


def targets() -> Iterator[Target]:
    """All of them."""
    for dtype in TYPES:
        for num_rows in combine.CLASSES:
            for variant in ("combine", "combine channels", "mix"):
                yield Target(combine.combine_chunks, num_rows, dtype, variant)
            for variant in ("sgd", "adam"):
                yield Target(finish.finish_chunks, num_rows, dtype, variant)
        for num_rows in gram.CLASSES:
            for variant in ("chunks", "channels", "difference", "product"):
                yield Target(gram.meta(num_rows, dtype, False)[0], num_rows, dtype, variant)
        for num_rows in (k for k in gram.CLASSES if k <= gram_combine.MAX_ROWS):
            yield Target(gram_combine.gram_combine_pairs, num_rows, dtype, "one read")
        for num_rows in priority.CLASSES:
            yield Target(priority.priority_products, num_rows, dtype, "products")
            yield Target(priority.priority_results, num_rows, dtype, "results")
        for num_rows in graddrop.CLASSES:
            yield Target(graddrop.graddrop_chunks, num_rows, dtype, "graddrop")
        for mode in MODES:
            yield Target(gradient_dropout.gradient_dropout_chunks, 1, dtype, mode)
        for trim in trimmed_mean.CLASSES:
            yield Target(trimmed_mean.trimmed_mean_chunks, 2 * trim + 1, dtype, f"trim {trim}")
        yield Target(perturb.perturb_chunks, 2, dtype, "perturb")
        yield Target(memory.memory_chunks, 4, dtype, "memory")
        yield Target(excess_risk.excess_chunks, 2, dtype, "excess")
    for num_rows in priority.CLASSES:
        yield Target(priority.priority_alphas, num_rows, torch.float64, "alphas")
    yield Target(gram.gram_finish, 0, torch.float64, "finish")


def signature(target: Target) -> dict[str, str]:
    """Types of the run-time arguments, as Triton writes them: what a call of the op passes."""
    if target.kernel is gram.gram_finish:
        pointers = {"partials": "*fp64", "slots": "*i64", "gram": "*fp64"}
        numbers = ["num_rows", "first_column", "num_columns", "num_blocks"]
    elif target.kernel is priority.priority_alphas:
        pointers = {"layers": "*i64", "products": "*fp64", "alphas": "*fp64"}
        numbers = ["num_rows", "skip_degenerate"]
    elif target.kernel in (priority.priority_products, priority.priority_results):
        pointers = {"table": "*i64", "products" if target.kernel is priority.priority_products else "alphas": "*fp64"}
        numbers = ["num_tensors", "num_rows"]
    elif target.kernel is combine.combine_chunks:
        pointers = {"table": "*i64", "narrow": "*fp64" if target.dtype == torch.float64 else "*fp32", "wide": "*fp64"}
        numbers = ["num_tensors", "num_rows", "num_results"]
    elif target.kernel is finish.finish_chunks:
        narrow = "*fp64" if target.dtype == torch.float64 else "*fp32"
        pointers = {"table": "*i64", "scalars": "*i64", "narrow": narrow, "wide": "*fp64", "lr": "*fp64", "skip": "*u8"}
        numbers = ["num_tensors", "num_rows", "flags"]
    elif target.kernel is perturb.perturb_chunks:
        pointers = {"table": "*i64", "radii": "*fp64"}
        numbers = ["num_tensors", "adaptive"]
    elif target.kernel is graddrop.graddrop_chunks:
        pointers = {"table": "*i64", "leak": "*fp64", "active": "*u8", "seeds": "*i64"}
        numbers = ["num_tensors", "num_rows", "all_active"]
    elif target.kernel is gradient_dropout.gradient_dropout_chunks:
        pointers = {"table": "*i64", "rate": "*fp64", "seeds": "*i64"}
        numbers = ["num_tensors"]
    elif target.kernel is trimmed_mean.trimmed_mean_chunks:
        pointers = {"table": "*i64", "active": "*u8"}
        numbers = ["num_tensors", "num_rows", "all_active", "trim"]
    elif target.kernel is memory.memory_chunks:
        pointers = {"table": "*i64", "factors": "*fp64"}
        numbers = ["num_tensors", "num_tasks", "squares"]
    elif target.kernel is excess_risk.excess_chunks:
        pointers = {"table": "*i64", "factors": "*fp64", "scalars": "*i64", "sums": "*fp64"}
        numbers = ["num_tensors"]
    elif target.kernel is gram_combine.gram_combine_pairs:
        pointers = {"table": "*i64", "out": "*fp64", "weights": "*fp64"}
        numbers = ["num_tensors", "num_rows", "num_blocks"]
    else:
        pointers = {"table": "*i64", "out": "*fp64"}
        numbers = ["num_tensors", "num_rows", "num_blocks"]
    return pointers | dict.fromkeys(numbers, "i32")


def compile_ahead(target: Target, gpu: str) -> Any:
    """The compiled kernel, with ``asm`` and ``metadata``; ``gpu`` is a name of ``GPUS``."""
    constants, options = target.launch_options(CHIPS[gpu])
    types = signature(target) | dict.fromkeys(constants, "constexpr")
    return triton.compile(ASTSource(target.kernel, types, constants), target=GPUS[gpu], options=options)
