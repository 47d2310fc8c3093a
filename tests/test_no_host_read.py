"""A step on a GPU never waits for it: asserted on the torch ops that a whole step dispatches for tensors without memory.

Fake CUDA tensors where torch was built for CUDA; meta tensors elsewhere, where autograd and indexing refuse fake CUDA ones.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from device import CSRC
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mtlkernels as mtl
from mtlkernels._library import NAMESPACE, REFERENCES
from mtlkernels.weightings import CROSS, MEMORY, REGISTRY

DEVICE = "cuda" if torch.version.cuda else "meta"

REFUSALS = (RuntimeError, NotImplementedError, DataDependentOutputException, DynamicOutputShapeException)
"""What reading a tensor without memory raises."""

WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""Tags of the ops whose result, or its size, the host learns from the device's values: item, equal, nonzero and their like."""

COPIES = ("copy_", "_to_copy", "to")

BINDINGS = [*CSRC.glob("bindings/*_cuda.cpp"), CSRC / "bindings/kxk.h"]
KERNELS = {op for file in BINDINGS for op in re.findall(r'm\.impl\("(\w+)"', file.read_text())}
"""Ops with a CUDA kernel. What their bindings call is asserted where the bindings run."""


class HostReads(TorchDispatchMode):
    """Records the torch ops that make the host wait for the device: values read, and blocking copies from or to it.

    Ops of this package without a CUDA kernel are replaced by their reference, so that what it calls is seen, too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels = KERNELS
        self.calls: list[str] = []
        self.reads: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.calls.append(str(func))
        space, _, name = func._schema.name.partition("::")
        if space == NAMESPACE and name not in self.kernels:
            with self:
                return REFERENCES[name](*args, **kwargs)
        leaves = tree_leaves([args, kwargs])
        devices = {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)}
        devices |= {leaf.type for leaf in leaves if isinstance(leaf, torch.device)}
        reads = name == "is_nonzero" or WAITS & set(func.tags)  # is_nonzero lacks the tag
        copies = name in COPIES and "cpu" in devices and not kwargs.get("non_blocking")
        if DEVICE in devices and (reads or copies):
            self.reads.append(str(func))
        return func(*args, **kwargs)


@pytest.fixture
def recorder() -> Iterator[HostReads]:
    with FakeTensorMode() if DEVICE == "cuda" else contextlib.nullcontext(), HostReads() as mode:
        yield mode


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=DEVICE)


def step(
    weighting: Any,
    fused: bool = True,
    micro_batches: int = 1,
    absent: str = "",
    other: bool = False,
    cheaper: str = "",
    finish: bool = False,
    **options: Any,
) -> mtl.optim.StepInfo:
    """A whole step of three tasks with heads. Autograd does not run on fake CUDA tensors: its result is made up.

    ``absent``: the tasks without a loss; ``other``: whether the step takes a second batch; ``cheaper``: where its Gram is from;
    ``finish``: whether it is fused.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "grad", lambda loss, inputs, **_: [torch.empty_like(t) for t in inputs])
        # It refuses meta tensors, which the fused step itself takes.
        patch.setattr(import_module("torch.optim.adam"), "_device_dtype_check_for_fused", lambda *_, **__: None)
        shared = [empty(8, 5).requires_grad_(), empty(8, dtype=torch.bfloat16).requires_grad_()]
        heads = {task: [empty(3, 8).requires_grad_()] for task in "abc"}
        inner = torch.optim.AdamW([*shared, *(t for head in heads.values() for t in head)])
        for group in inner.param_groups:
            group["fused"] = fused
        if options.get("per") == "groups":
            options = options | {"per": {"first": shared[:1]}}
        optimizer = mtl.MultiTaskOptimizer(inner, weighting, shared=shared, heads=heads, fused=finish, **options)
        for _ in range(2 if options.get("weights_from") == "previous" else options.get("update_every", 1)):
            for _ in range(micro_batches - 1):
                optimizer.accumulate({task: empty().requires_grad_() for task in heads})
            losses = {task: empty().requires_grad_() for task in heads if task not in absent}
            second = {task: empty().requires_grad_() for task in losses} if other else None
            more: dict[str, Any] = {}
            if cheaper == "representation":
                more = {
                    "representation": [empty(6, 8).requires_grad_() * 1, empty(6, dtype=torch.bfloat16).requires_grad_() * 1]
                }
            if cheaper == "gram_losses":
                more = {"gram_losses": [{task: empty().requires_grad_() for task in losses} for _ in range(2)]}
            info = optimizer.step(losses, other=second, **more)
        return info


def test_step_with_cagrad(recorder):
    info = step(mtl.CAGrad(c=0.4), max_norm=1.0)
    assert recorder.reads == []
    assert info.host_reads == 0
    assert {"mtlkernels.gram.default", "mtlkernels.combine_.default", "aten._fused_adamw_.default"} <= set(recorder.calls)


OPTIONS = [{}, {"on_nonfinite": "drop_task"}, {"per": "tensor"}, {"per": "channel"}, {"per": "groups"}, {"update_every": 2}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("weighting", ["cagrad", "conicgrad", "mgda", "pcgrad", "mean"])
def test_step_with_other_weightings_and_options(recorder, weighting, options):
    step(weighting, **options)
    assert recorder.reads == []


@pytest.mark.parametrize("options", [*OPTIONS[:2], {"max_norm": 1.0}, {"update_every": 2}], ids=str)
@pytest.mark.parametrize("cheaper", ["representation", "gram_losses"])
def test_step_with_a_cheaper_gram(recorder, cheaper, options):
    info = step("cagrad", cheaper=cheaper, **options)
    assert recorder.reads == []
    assert info.host_reads == 0
    assert {"mtlkernels.gram.default", "mtlkernels.combine_.default"} <= set(recorder.calls)


@pytest.mark.parametrize("options", [{}, {"max_norm": 1.0}, {"absent": "b"}, {"weighting": "modo", "other": True}], ids=str)
def test_step_with_the_weights_of_the_step_before(recorder, options):
    weighting = mtl.get_weighting(options.get("weighting", "cagrad")).to(DEVICE)
    recorder.reads.clear()  # its state has moved to the device, once
    info = step(**{"tasks": tuple("abc"), "weights_from": "previous"} | options | {"weighting": weighting})
    assert recorder.reads == []
    assert info.host_reads == 0
    assert "mtlkernels.gram_combine_.default" in recorder.calls


NEEDS = {"cr_mogm": {"weighting": "mgda"}, "krum": {"n_byzantine": 0}}


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("name", sorted(set(REGISTRY) - {"constant"}))  # which checks its weights on the host when it is made
def test_every_weighting_and_micro_batches(recorder, name, micro_batches):
    weighting = mtl.get_weighting(name, **NEEDS.get(name, {})).to(DEVICE)
    if weighting.loss_only and micro_batches > 1:
        pytest.skip("a weighting of losses has no gradients of tasks to add up")
    recorder.reads.clear()  # its state has moved to the device, once
    step(weighting, micro_batches=micro_batches)
    assert recorder.reads == []


@pytest.mark.parametrize("options", [{}, {"max_norm": 1.0}, {"on_nonfinite": "drop_task"}, {"absent": "bc"}], ids=str)
@pytest.mark.parametrize("name", [*MEMORY, *CROSS])
def test_weightings_of_memories_and_of_two_batches(recorder, name, options):
    weighting = mtl.get_weighting(name).to(DEVICE)
    recorder.reads.clear()  # its state has moved to the device, once
    info = step(weighting, other=name in CROSS, tasks=tuple("abc"), **options)
    assert recorder.reads == []
    assert info.host_reads == 0
    assert name in CROSS or "mtlkernels.memory_combine_.default" in recorder.calls


@pytest.mark.parametrize("name", [*MEMORY, *CROSS])
def test_aggregate_with_memories_and_two_batches(recorder, name):
    weighting = mtl.get_weighting(name).to(DEVICE)
    recorder.reads.clear()
    grads, other = ([[empty(8, 5), empty(8, dtype=torch.bfloat16)] for _ in range(3)] for _ in range(2))
    for _ in range(2):
        mtl.aggregate(grads, weighting, losses=empty(3), other=other if name in CROSS else None)
    assert recorder.reads == []


def test_a_read_planted_in_a_weighting_with_a_memory_is_recorded(recorder):
    class Reads(mtl.MomentumConFIG):
        def combine(self, update, *others):
            assert update.weights.isfinite().all()
            return super().combine(update, *others)

    with contextlib.suppress(*REFUSALS):
        mtl.aggregate([[empty(3)], [empty(3)]], Reads().to(DEVICE))
    assert len(recorder.reads) >= 1


def test_raise_reads_once(recorder):
    with contextlib.suppress(*REFUSALS):
        step("mean", on_nonfinite="raise")
    assert len(recorder.reads) == 1


@pytest.mark.parametrize("options", [{}, {"max_norm": 1.0}, {"on_nonfinite": "drop_task"}], ids=str)
def test_step_with_an_elementwise_method(recorder, options):
    info = step("graddrop", **options)
    assert recorder.reads == []
    assert info.host_reads == 0
    assert "mtlkernels.graddrop_.default" in recorder.calls


def test_reference_of_the_trimmed_mean_reads_nothing(recorder):
    """Its buffers' check asks for addresses, which fake tensors lack: here with new results."""
    active = empty(4, dtype=torch.bool)
    mtl.TrimmedMean(1)([[empty(8, 5), empty(8, dtype=torch.bfloat16)] for _ in range(4)], active=active)
    assert recorder.reads == []
    assert "mtlkernels.trimmed_mean.default" in recorder.calls


@pytest.mark.parametrize("weighting", [pytest.param("cagrad", marks=pytest.mark.slow), "mgda", "pcgrad"])
def test_references_of_the_solvers_read_nothing(recorder, weighting):
    recorder.kernels = {"gram", "combine_"}
    step(weighting)
    assert recorder.reads == []
    assert f"mtlkernels.{weighting}_weights.default" in recorder.calls


def test_step_whose_optimizer_cannot_skip_on_the_device_reads_once(recorder):
    with contextlib.suppress(*REFUSALS):  # there is no value to read
        step("mean", fused=False)
    assert len(recorder.reads) == 1


def flat_step(**options: Any) -> mtl.FlatInfo:
    """A whole step of FlatMinimaOptimizer, as :func:`step`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "grad", lambda loss, inputs, **_: [torch.empty_like(t) for t in inputs])
        patch.setattr(import_module("torch.optim.adam"), "_device_dtype_check_for_fused", lambda *_, **__: None)
        shared = [empty(8, 5).requires_grad_(), empty(8, dtype=torch.bfloat16).requires_grad_()]
        heads = {task: [empty(3, 8).requires_grad_()] for task in "abc"}
        inner = torch.optim.AdamW([*shared, *(t for head in heads.values() for t in head)])
        for group in inner.param_groups:
            group["fused"] = True
        optimizer = mtl.FlatMinimaOptimizer(inner, shared=shared, heads=heads, **options)
        return optimizer.step(lambda: {task: empty().requires_grad_() for task in heads})


@pytest.mark.parametrize(
    "options",
    [
        {"weighting": "cagrad", "max_norm": 1.0},
        {"weighting": "mgda", "adaptive": True, "joint": True, "per": "tensor"},
        {"weighting": "pcgrad", "aggregation": "second", "on_nonfinite": "drop_task"},
        {"weighting": "cagrad", "aggregation": "each"},
        {"weighting": "mgda", "aggregation": "direct", "perturbation": "samo"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_flat_steps(recorder, options):
    info = flat_step(**options)
    assert recorder.reads == []
    assert info.host_reads == 0
    assert "mtlkernels.perturb_.default" in recorder.calls
    assert {"mtlkernels.paired_gram.default", "mtlkernels.gram.default"} & set(recorder.calls)


READS: dict[str, Callable[[Tensor], Any]] = {
    "item": Tensor.item,
    "tolist": lambda x: x.tolist(),
    "bool": lambda x: bool((x > 0).all()),
    "float": lambda x: float(x.sum()),
    "cpu": Tensor.cpu,
    "to": lambda x: x.to("cpu", torch.float64),
    "copy to the host": lambda x: torch.empty(x.shape).copy_(x),
    "copy from the host": lambda x: x.copy_(torch.zeros(x.shape)),
    "nonzero": Tensor.nonzero,
    "mask": lambda x: x.masked_select(x > 0),
    "unique": torch.unique,
    "equal": lambda x: torch.equal(x, x + 1),
}


@pytest.mark.parametrize("below_autograd", [False, True])
@pytest.mark.parametrize("read", READS)
def test_each_kind_of_read_is_recorded(recorder, read, below_autograd):
    tensor = empty(1) if read == "item" else empty(3)
    guard = torch._C._AutoDispatchBelowAutograd() if below_autograd else contextlib.nullcontext()
    with guard, contextlib.suppress(*REFUSALS):
        READS[read](tensor)
    assert recorder.reads


def test_a_read_planted_in_a_weighting_or_in_its_op_is_recorded(recorder, monkeypatch):
    class Reads(mtl.Mean):
        def weights(self, gram, *others):
            return super().weights(gram, *others) * gram[0, 0].item()

    with contextlib.suppress(*REFUSALS):
        step(Reads())
    assert len(recorder.reads) == 1

    recorder.kernels = {"gram", "combine_"}
    original = REFERENCES["mgda_weights"]
    monkeypatch.setitem(REFERENCES, "mgda_weights", lambda gram, active: original(gram * gram.sum().item(), active))
    with contextlib.suppress(*REFUSALS):
        step("mgda")
    assert len(recorder.reads) == 2


def test_work_on_the_device_is_no_read(recorder):
    x = empty(3)
    torch.where(x > 0, x, 0.0).add_(torch.ones(())).to(torch.float64).cumsum(0)
    assert recorder.reads == []
