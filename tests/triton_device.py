"""Triton kernels on the CPU: a plan's own launches, compiled ahead of time and run from their PTX."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import ptxsim
import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from triton.compiler import ASTSource  # noqa: E402

from mtlkernels.triton import combine, gram, targets  # noqa: E402
from mtlkernels.triton.launch import Launch, contiguous, lie_alike, split  # noqa: E402

POINTERS = {torch.int64: "*i64", torch.uint8: "*u8", torch.float32: "*fp32", torch.float64: "*fp64"}
BYTES = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2, torch.float64: 8}


def signature(launch: Launch) -> dict[str, str]:
    """Types of the arguments that a launch passes."""
    names = launch.kernel.arg_names
    types = ["i32" if isinstance(a, int) else POINTERS[a.dtype] for a in launch.arguments]
    return dict(zip(names, types, strict=False))


@cache
def _compile(kernel: Any, types: tuple, constants: tuple, options: tuple, gpu: str) -> "ptxsim.Module":
    source = ASTSource(kernel, dict(types) | dict.fromkeys(dict(constants), "constexpr"), dict(constants))
    return ptxsim.from_triton(triton.compile(source, target=targets.GPUS[gpu], options=dict(options)))


def module(launch: Launch, gpu: str = "sm_90") -> "ptxsim.Module":
    types, constants, options = signature(launch), launch.constants, launch.options
    return _compile(launch.kernel, tuple(types.items()), tuple(constants.items()), tuple(options.items()), gpu)


def run(
    launches: Sequence[Launch], gradients: Sequence[Sequence[Tensor | None]], results: Sequence[Tensor] = (), **options: Any
) -> list["ptxsim.Report"]:
    """Runs launches in order; ``gradients`` are read only unless a result shares their memory. Reports in the same order."""
    rows = [row for column in gradients for row in column if row is not None and row.numel()]
    written = {result.data_ptr() for result in results}
    return [
        module(launch).launch(
            None,
            launch.blocks,
            None,
            list(launch.arguments),
            mem=[*rows, *results],
            readonly=[row for row in rows if row.data_ptr() not in written],
            **options,
        )
        for launch in launches
    ]


def run_gram(grads: Sequence[Sequence[Tensor | None]], per: str = "model", other: int = 0, **options: Any) -> Tensor:
    """What the op gram returns for K rows; with ``other``, the cross Gram of the first K - other rows and the rest."""
    columns = _columns(grads, per == "channel")
    launches, result = gram.plan(columns, len(grads), per, len(grads) - other if other else 0)
    run_gram.reports = run(launches, columns, **options)
    return result


def run_combine(
    grads: Sequence[Sequence[Tensor | None]], coefficients: Tensor, out: Sequence[Tensor] | None = None, **options: Any
) -> list[list[Tensor]]:
    """[M][N] results for coefficients [M, K]; with [N, K] of a single result per tensor, pass ``out``."""
    columns = _columns(grads, False)
    models = [next(row for row in column if row is not None) for column in columns]
    results = [[t] for t in out] if out else [[torch.empty_like(m) for _ in range(len(coefficients))] for m in models]
    per_tensor = out is not None and len(coefficients) > 1
    placed = [combine.Column(*pair, n if per_tensor else 0) for n, pair in enumerate(zip(columns, results, strict=True))]
    flat = [t for own in results for t in own]
    run_combine.reports = run(combine.plan(placed, coefficients), columns, flat, **options)
    return [[own[m] for own in results] for m in range(len(results[0]))]


def _columns(grads: Sequence[Sequence[Tensor | None]], row_major: bool) -> list[list[Tensor | None]]:
    columns = split([t for row in grads for t in row], len(grads), len(grads[0]))
    return [column if lie_alike(column, row_major) else contiguous(column) for column in columns]


def misaligned(values: Tensor, offset: int) -> Tensor:
    """A copy that starts ``offset`` elements past an aligned address."""
    base = torch.empty(values.numel() + offset, dtype=values.dtype)
    base[offset:] = values.flatten()
    return base[offset:].view(values.shape)


def conflicts(report: "ptxsim.Report") -> float:
    """Share of shared-memory wavefronts beyond the least possible number."""
    wavefronts = report.shared_load_wavefronts + report.shared_store_wavefronts
    return (report.shared_load_conflicts + report.shared_store_conflicts) / max(wavefronts, 1)
