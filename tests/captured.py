"""What a CUDA graph does with a step, on a CPU: the torch ops of one step, run again on the memory they had; and such steps."""

import contextlib
from typing import Any

import torch
from multitask_models import TASKS, Net
from priority_models import task_net
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import mtlkernels as mtl
from mtlkernels.optim.held import HeldWeights
from mtlkernels.weightings import REGISTRY

WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""Tags of the ops whose result, or its size, the host learns from the device's values."""


class CaptureError(RuntimeError):
    """What ends a capture: the host waits for the device."""


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Capture(TorchDispatchMode):
    """Records the ops of a block; :meth:`replay` runs them again, as a graph does: the same memory, and no Python.

    Python that ran in the block does not run again. So a state that the block bound to a new tensor, instead of writing it in
    place, is read from its old address in every replay and never moves on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if WAITS & set(func.tags) or name == "is_nonzero":
            raise CaptureError(f"{func} makes the host wait")
        kwargs = kwargs or {}
        held = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, (args, kwargs))  # keeps the address
        result = func(*args, **kwargs)
        given = {_storage(leaf) for leaf in tree_leaves(held) if isinstance(leaf, Tensor)}
        fresh = [leaf.detach() for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and _storage(leaf) not in given]
        if fresh or func._schema.is_mutable:
            self.ops.append((func, *held, fresh))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, outputs in self.ops:
            given = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            result = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)]
            for output, value in zip(outputs, [leaf for leaf in result if _storage(leaf) not in given], strict=True):
                output.copy_(value)


# --- steps to capture ---------------------------------------------------------------------------------------------------

BAD = 5
"""The step whose batch is not finite: whether it is skipped is decided in the replay."""
OPTIONS = {"constant": {"weights": [0.5, 1.0, 2.0]}, "cr_mogm": {"weighting": "mgda"}, "krum": {"n_byzantine": 0}}


class Loop:
    """A model that is trained on whatever its static input holds."""

    def __init__(self, make, call, scaler: bool = False, model=lambda: Net(width=4), shape=(6, 4), device: str = "cpu") -> None:
        self.model = model().to(device)
        self.x = torch.zeros(shape, device=device)
        inner = torch.optim.AdamW(self.model.parameters(), 0.01, fused=True, capturable=True)
        self.optimizer = make(inner, self.model)
        self.scaler = torch.amp.GradScaler(device, init_scale=64.0, growth_interval=3) if scaler else None
        self.call = call
        self.info = None

    def losses(self) -> dict[str, Tensor]:
        outputs = self.model(self.x.to(next(self.model.parameters()).dtype))
        return {task: (y - k).square().mean() for k, (task, y) in enumerate(outputs.items())}

    def load(self, step: int, bad: bool = False) -> None:
        """A new batch in the memory of the last."""
        self.x.copy_(torch.randn(self.x.shape, generator=torch.Generator().manual_seed(step)) * (torch.nan if bad else 1.0))

    def step(self) -> None:
        self.info = self.call(self)

    def state(self) -> dict[str, Tensor]:
        """Everything that a step leaves to the next one."""
        result = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        for n, state in enumerate(self.optimizer.state.values()):
            result |= {f"inner {n} {name}": value for name, value in state.items()}
        for name in ("weighting", "weightings", "affinity"):
            module = getattr(self.optimizer, name, None)
            if module is not None:
                result |= {f"{name} {key}": value for key, value in module.named_buffers()}
        held = getattr(self.optimizer, "_held", None)  # of TaskPriorityOptimizer a method
        if isinstance(held, HeldWeights) and held.weights is not None:
            result["held weights"] = held.weights
        if self.scaler is not None:
            result |= {"scale": self.scaler._scale, "growth": self.scaler._growth_tracker}
        if self.call is into_kept_memory:
            result |= {f".grad of {name}": p.grad for name, p in self.model.named_parameters()}
        return {name: value.detach() for name, value in result.items()}


def multi(weighting="upgrad", **options):
    def make(inner: torch.optim.Optimizer, model: Net) -> mtl.MultiTaskOptimizer:
        method = mtl.get_weighting(weighting, **OPTIONS.get(weighting, {}))
        own = {"per": {"first": list(model.encoder[0].parameters())}} if options.get("per") == "groups" else {}
        return mtl.MultiTaskOptimizer(inner, method, heads=model.head_parameters(), **(options | own))

    return make


def flat(**options):
    return lambda inner, model: mtl.FlatMinimaOptimizer(inner, "imtl_g", heads=model.head_parameters(), **options)


def whole(loop: Loop):
    return loop.optimizer.step(loop.losses())


def of_a_function(loop: Loop):
    return loop.optimizer.step(loop.losses)


def backward_and_step(loop: Loop):
    loop.optimizer.zero_grad()
    info = loop.optimizer.backward(loop.losses())
    loop.optimizer.step()
    return info


def into_kept_memory(loop: Loop):
    loop.optimizer.zero_grad(set_to_none=False)
    info = loop.optimizer.backward(loop.losses())
    loop.optimizer.step()
    return info


def accumulating(loop: Loop):
    loop.optimizer.accumulate(loop.losses())
    loop.optimizer.accumulate(loop.losses())
    return loop.optimizer.step(loop.losses())


def at_the_representation(loop: Loop):
    z = loop.model.encoder(loop.x)
    losses = {task: (head(z) - k).square().mean() for k, (task, head) in enumerate(loop.model.heads.items())}
    return loop.optimizer.step(losses, representation=z, scaler=loop.scaler)


def of_halves_of_a_sub_batch(loop: Loop):
    def half(rows: slice) -> dict[str, Tensor]:
        return {task: (y - k).square().mean() for k, (task, y) in enumerate(loop.model(loop.x[rows]).items())}

    return loop.optimizer.step(loop.losses(), gram_losses=[half(slice(0, 2)), half(slice(2, 4))])


def scaled(loop: Loop):
    return loop.optimizer.step(loop.losses(), scaler=loop.scaler)


def scaled_in_three_calls(loop: Loop):
    loop.optimizer.zero_grad()
    info = loop.optimizer.backward(loop.losses(), loop.scaler)
    loop.scaler.step(loop.optimizer)
    loop.scaler.update()
    return info


def priority(mode: str, **options):
    return lambda inner, model: mtl.TaskPriorityOptimizer(inner, model, mode=mode, **options)


def of_closures(loop: Loop):
    def loss(task: str) -> Tensor:
        return (loop.model(loop.x, task) - TASKS.index(task)).square().mean()

    return loop.optimizer.step({task: lambda task=task: loss(task) for task in TASKS}, scaler=loop.scaler)


LOOPS = {
    **{name: (multi(name), whole) for name in REGISTRY},
    **{f"per {per}": (multi("mgda", per=per), whole) for per in ("tensor", "channel", "groups")},
    "gradvac per tensor": (multi("gradvac", per="tensor"), whole),
    "clipped": (multi(max_norm=0.1), whole),
    "weights of the step before": (multi("gradvac", weights_from="previous"), whole),
    "weights of the step before, clipped": (multi("mgda", weights_from="previous", max_norm=0.1), scaled, True),
    "drop_task": (multi("gradvac", on_nonfinite="drop_task"), whole),
    "loss.backward": (multi(gradients="backward"), whole),
    "backward": (multi(), backward_and_step),
    "backward into kept .grad": (multi(), into_kept_memory),
    "accumulate": (multi("gradvac"), accumulating),
    "representation": (multi("gradvac", max_norm=0.1), at_the_representation),
    "representation, scaler": (multi("gradvac", max_norm=0.1), at_the_representation, True),
    "representation, drop_task": (multi("gradvac", on_nonfinite="drop_task"), at_the_representation),
    "gram_losses": (multi("gradvac", max_norm=0.1), of_halves_of_a_sub_batch),
    "scaler": (multi("gradvac", max_norm=0.1), scaled, True),
    "scaler in three calls": (multi("gradvac"), scaled_in_three_calls, True),
    "fused": (multi("gradvac", fused=True), whole),
    "fused per tensor, clipped": (multi("mgda", per="tensor", max_norm=0.1, fused=True), whole),
    "fused with a scaler": (multi(max_norm=0.1, fused=True), scaled, True),
    "fused accumulate": (multi("gradvac", fused=True), accumulating),
    "fused loss-only": (multi("uncertainty", fused=True), whole),
    "master weights": (
        lambda inner, model: multi("gradvac")(mtl.MasterWeights(inner), model),
        whole,
        False,
        lambda: Net(width=4).to(torch.bfloat16),
    ),
    "flat": (flat(rho=0.1), of_a_function),
    "flat second": (flat(aggregation="second", adaptive=True), of_a_function),
    "flat samo": (flat(aggregation="direct", perturbation="samo"), of_a_function),
    "priority phase 1": (priority("phase1"), of_closures, False, task_net, (7, 2, 4, 4)),
    "priority phase 2": (priority("phase2", max_norm=0.1), of_closures, True, task_net, (7, 2, 4, 4)),
    "priority with a weighting": (priority("phase2", weighting="gradvac"), of_closures, False, task_net, (7, 2, 4, 4)),
}


def train(loop: Loop, capture: Any = None) -> tuple[list[list[Tensor]], dict[str, Tensor]]:
    """What eight steps tell, and the state that they leave. ``capture``: takes the third step and replays it from then on."""
    torch.manual_seed(0)  # of random weightings, which draw on the device in each replay
    for step in range(2):  # warm-up: state is allocated
        loop.load(step)
        loop.step()
    addresses = {key: value.data_ptr() for key, value in loop.state().items()}
    loop.load(2)
    with capture or contextlib.nullcontext():
        loop.step()
    seen = []
    for step in range(3, 8):
        loop.load(step, bad=step == BAD)
        loop.step() if capture is None else capture.replay()
        names = ("losses", "skipped", *(["weights"] if hasattr(loop.info, "weights") else []))
        seen.append([getattr(loop.info, name).clone() for name in names])
    assert {key: value.data_ptr() for key, value in loop.state().items()} == addresses
    return seen, loop.state()
