"""The Triton kernels compiled ahead of time for every GPU of targets.py: no spills, 16-byte loads, registers to spare."""

import random
import re
import subprocess
import sys
from collections.abc import Sequence

import ptxsim
import pytest
import torch
from helpers import random_gradients
from triton_device import signature

from mtlkernels import _library
from mtlkernels.gradient_dropout import MODES
from mtlkernels.memory import memory_dtype
from mtlkernels.triton import (
    combine,
    excess_risk,
    finish,
    graddrop,
    gradient_dropout,
    gram,
    gram_combine,
    launch,
    memory,
    perturb,
    priority,
    targets,
    trimmed_mean,
)

ALL = [(target, gpu) for target in targets.targets() for gpu in targets.GPUS]
SHARD = 8
SEED = 20
CHOSEN = set(random.Random(SEED).sample(range(len(ALL)), SHARD))


def cases() -> Sequence:
    """Every kernel on every GPU; those outside of the shard that SEED draws are slow."""
    return [
        pytest.param(target, gpu, id=f"{target}-{gpu}", marks=() if i in CHOSEN else pytest.mark.slow)
        for i, (target, gpu) in enumerate(ALL)
    ]


STAGES_BETWEEN = (gram.gram_finish, priority.priority_alphas)
"""Kernels that read no gradients."""


def max_registers(target: targets.Target) -> int:
    """Of a thread: 128 leave room for two programs of 256 threads, 160 for three of 128 threads, 255 for one or two."""
    if target.kernel in STAGES_BETWEEN:
        return 64 if target.num_rows <= 16 else 255
    if target.kernel in (combine.combine_chunks, perturb.perturb_chunks, gradient_dropout.gradient_dropout_chunks):
        return 160
    if target.kernel is graddrop.graddrop_chunks:  # 16 bytes of 16 bits are eight elements, each with four sums and a word
        return 160 if target.dtype.itemsize >= 4 else 240
    if target.kernel is trimmed_mean.trimmed_mean_chunks:  # what is kept of 16 bytes on both sides, which exchanges bound
        return 160 if target.variant == "trim 1" else 255
    if target.kernel is gram_combine.gram_combine_pairs:  # a whole chunk's results wait in registers
        return 255
    if target.kernel is finish.finish_chunks:  # beside the gradients, up to four rows of float32 that move
        return 255
    if target.num_rows <= 4:
        return 128
    return 255 if (target.num_rows, target.dtype) == (64, torch.float32) else 216


def loads_vectors(target: targets.Target) -> bool:
    """Whether it reads gradients 16 bytes at a time: not where what is kept leaves registers for one element a thread."""
    return target.kernel not in STAGES_BETWEEN and target.variant != "trim 32"


@pytest.mark.parametrize(("target", "gpu"), cases())
def test_compiled_code(target, gpu):
    compiled = targets.compile_ahead(target, gpu)
    if gpu.startswith("gfx"):
        check_amd(target, compiled)
        return
    (used,) = ptxsim.from_triton(compiled).resources().values()
    assert used["spill_loads"] == used["spill_stores"] == used["stack"] == 0
    assert used["registers"] <= max_registers(target)
    assert compiled.metadata.shared <= 99 * 1024  # sm_86, 89 and 120 have the least
    text = compiled.asm["ptx"]
    assert ".local" not in text
    if loads_vectors(target):
        assert re.search(r"ld\.global\.v(4\.b32|2\.b64)|cp\.async\.cg\.shared\.global .*0x10", text)
    if target.kernel is combine.combine_chunks:
        # A thread writes its share of a tile, which is less than 16 bytes where rows are many.
        assert re.search(r"st\.global\.v(2|4)\.b(32|64)", text) or target.num_rows >= 8


def check_amd(target: targets.Target, compiled) -> None:
    text = compiled.asm["amdgcn"]
    used = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)\b", text)}
    # Scalar registers spill to lanes of vector registers, not to memory.
    assert used["vgpr_spill_count"] == 0
    assert used["private_segment_fixed_size"] == 0
    assert used["vgpr_count"] <= 512 - 128 * (target.num_rows <= 4)
    assert compiled.metadata.shared <= 64 * 1024
    if loads_vectors(target):
        assert re.search(r"(global|buffer)_load_dwordx4", text)


def key(kernel, types: dict, constants: dict, options: dict) -> tuple:
    return kernel.fn.__name__, *(tuple(sorted(d.items(), key=str)) for d in (types, constants, options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("num_tasks", [1, 3, 8, 9, 40])
def test_every_launch_is_on_the_list(dtype, num_tasks):
    listed = {key(t.kernel, targets.signature(t), *t.launch_options()) for t in targets.targets()}
    columns = list(zip(*random_gradients(num_tasks, [(300,), (7, 5)], dtype), strict=True))
    launches = [*gram.plan(columns, num_tasks, "model").launches, *gram.plan(columns, num_tasks, "channel").launches]
    for num_results in (1, 2):
        placed = [combine.Column(c, [torch.empty_like(c[0])] * num_results, 0) for c in columns]
        launches += combine.plan(placed, torch.ones(num_results, num_tasks, dtype=torch.float64))
    layers = [priority.Layer(c, torch.empty_like(c[0]), torch.zeros(len(c[0]), dtype=torch.int64)) for c in columns]
    launches += priority.plan(layers, True)
    assert len(launches) == 8
    for form in ("difference", "product"):
        launches += (
            gram.plan([[*c, *c] for c in columns], 2 * num_tasks, "model", form=form).launches if num_tasks <= 32 else []
        )
    first = [[c[0], c[0]] for c in columns]
    launches += perturb.plan(first, [torch.empty_like(c[0]) for c in columns], torch.ones(2, dtype=torch.float64), True)
    drop = graddrop.Drop(torch.zeros(num_tasks, dtype=torch.float64), None, torch.zeros(1, dtype=torch.int64), [0, 1])
    launches += graddrop.plan(columns, [torch.empty_like(c[0]) for c in columns], drop)
    for mode in MODES:
        dropout = gradient_dropout.Dropout(
            torch.tensor(0.1, dtype=torch.float64), mode, torch.zeros(1, dtype=torch.int64), [0, 1]
        )
        launches += gradient_dropout.plan([c[:1] for c in columns], [torch.empty_like(c[0]) for c in columns], dropout)
    for trim in {min(trim, (num_tasks - 1) // 2) for trim in trimmed_mean.CLASSES}:
        launches += trimmed_mean.plan(columns, [torch.empty_like(c[0]) for c in columns], num_tasks, trim, None)
    rows = [[*c, *(t.to(memory_dtype(t.dtype)) for t in c)] for c in columns]
    launches += memory.plan(rows, [torch.empty_like(c[0]) for c in columns], torch.ones(3, num_tasks), False)
    ones, lr = torch.ones(num_tasks, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)
    if num_tasks <= gram_combine.MAX_ROWS:
        launches += gram_combine.plan(columns, [torch.empty_like(c[0]) for c in columns], ones)[0]
    launches += excess_risk.plan([[row[0], row[-1]] for row in rows], [0] * len(rows), ones, 1e-7)[0]
    for moved, steps in (2, []), (3, [torch.ones(())] * 2):
        states = [[torch.empty_like(c[0]) for _ in range(moved)] for c in columns]
        launches += finish.plan(columns, states, steps, ones, lr, None, [0.0] * 6, 0)
    for own in launches:
        assert key(own.kernel, signature(own), own.constants, own.options) in listed


def test_more_blocks_than_a_grid_has():
    work = launch.Work(2**45, 8192, 0, [16])
    with pytest.raises(ValueError, match=r"take 4294967296 blocks, a launch at most 2147483647; pass fewer"):
        launch.table_of([work])


def test_the_package_imports_without_triton():
    code = """
import sys
import mtlkernels
assert not any(name.partition(".")[0] == "triton" for name in sys.modules), "Triton is imported"
"""
    environment = {"PYTHONPATH": str(_library.PACKAGE.parent), "PATH": "", "MTLKERNELS_DISABLE_C": "1"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_too_many_tasks():
    with pytest.raises(ValueError, match=r"grads has 65 rows; gram takes at most 64 in Triton"):
        gram.meta(65, torch.float32, False)
    with pytest.raises(ValueError, match=r"grads has 257 rows; combine and mix take at most 256 tasks in Triton"):
        combine.meta(257, torch.float32, True)
    with pytest.raises(ValueError, match=r"grads has 65 rows; priority_combine takes at most 64 tasks in Triton"):
        priority.meta(65, torch.float32)
    with pytest.raises(ValueError, match=r"trim is 33; trimmed_mean leaves out at most 32 gradients on each side in Triton"):
        trimmed_mean.meta(33, torch.float32)
