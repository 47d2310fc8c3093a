"""A step of task priority on a GPU never waits for it, as test_no_host_read asserts of the other optimizers."""

import contextlib
from importlib import import_module
from typing import Any

import pytest
import torch
from test_no_host_read import REFUSALS, HostReads, empty, recorder  # noqa: F401  recorder is a fixture

import mtlkernels as mtl

TASKS = ("a", "b", "c")


@pytest.fixture(autouse=True)
def without_addresses(recorder: HostReads) -> None:  # noqa: F811
    """The reference of the op that writes into buffers compares their addresses, which tensors without memory lack."""
    recorder.kernels = recorder.kernels | {"priority_combine_"}


def step(mode: str, fused: bool = True, present: tuple[str, ...] = TASKS, **options: Any) -> mtl.PriorityInfo:
    """A whole step of three tasks. Autograd does not run on fake CUDA tensors: its result is made up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "grad", lambda loss, inputs, **_: [torch.empty_like(t) for t in inputs])
        # It refuses meta tensors, which the fused step itself takes.
        patch.setattr(import_module("torch.optim.adam"), "_device_dtype_check_for_fused", lambda *_, **__: None)
        norm = mtl.nn.TaskBatchNorm2d(8, TASKS)
        before = mtl.nn.TaskLayerNorm(5, TASKS)
        for values in (norm.weight, norm.bias, before.weight, before.bias):
            for k, value in enumerate(values):
                values[k] = torch.nn.Parameter(empty(*value.shape))
        for name, buffer in norm.named_buffers():
            norm._buffers[name] = empty(*buffer.shape, dtype=buffer.dtype)
        model = torch.nn.Module()
        model.norm, model.before = norm, before
        model.conv, model.linear = (torch.nn.Parameter(empty(*shape)) for shape in ((8, 3, 3, 3), (6, 5)))
        layers = [mtl.nn.Layer(model.conv, norm), mtl.nn.Layer(model.linear, before, "before")]
        inner = torch.optim.AdamW(model.parameters())
        for group in inner.param_groups:
            group["fused"] = fused
        optimizer = mtl.TaskPriorityOptimizer(inner, model, mode=mode, layers=layers, tasks=TASKS[::-1], **options)
        info = optimizer.step({task: lambda: empty().requires_grad_() for task in present})
        mtl.monitor.PriorityMonitor(optimizer).record(info)
        return info


@pytest.mark.parametrize(
    "options", [{}, {"max_norm": 1.0}, {"weighting": "cagrad"}, {"loss_weights": {"a": 2.0}}, {"transactional": True}], ids=str
)
@pytest.mark.parametrize("mode", ["phase1", "phase2"])
def test_step(recorder: HostReads, mode: str, options: dict):  # noqa: F811
    info = step(mode, **options)
    assert recorder.reads == []
    assert info.host_reads == 0
    assert recorder.calls.count("aten._fused_adamw_.default") == (3 if mode == "phase1" else 1)
    if mode == "phase2" and "weighting" not in options:
        assert "mtlkernels.priority_combine_.default" in recorder.calls
        assert "mtlkernels.connection_strength.default" in recorder.calls


@pytest.mark.parametrize("weighting", [None, "mgda"])
@pytest.mark.parametrize("mode", ["phase1", "phase2"])
def test_step_that_lacks_a_task(recorder: HostReads, mode, weighting):  # noqa: F811
    step(mode, present=("c", "a"), weighting=weighting)
    assert recorder.reads == []


@pytest.mark.parametrize("mode", ["phase1", "phase2"])
def test_inner_step_that_cannot_skip_on_the_device_reads_once_a_visit(recorder: HostReads, mode):  # noqa: F811
    with contextlib.suppress(*REFUSALS):  # there is no value to read
        step(mode, fused=False)
    assert len(recorder.reads) == 1  # of the first visit


def test_raise_reads_once_a_visit(recorder: HostReads):  # noqa: F811
    with contextlib.suppress(*REFUSALS):
        step("phase2", on_nonfinite="raise")
    assert len(recorder.reads) == 1
