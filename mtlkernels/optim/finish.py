"""Steps of torch's SGD, Adam and AdamW by the ops that combine task gradients: ``MultiTaskOptimizer(..., fused=True)``."""

import operator
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from ..checks import check_gradients
from ..distributed.ranks import Ranks
from ..dtensor import local
from ..finish import combine_adam_, combine_sgd_
from ..gradients import Rows
from ..weightings import Elementwise, MemoryWeighting, Weighting
from .info import StepInfo

if TYPE_CHECKING:
    from .multitask import MultiTaskOptimizer

KINDS = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
"""The optimizers whose step the ops are; no subclasses, which may do anything else."""


class Part(NamedTuple):
    """Gradients that share a set of weights, or have one for each tensor."""

    params: Sequence[Tensor]
    """N parameters."""
    rows: Rows
    """R lists of N gradients, of what this rank holds of the parameters."""
    weights: Tensor
    """float64 [R] or [N, R]: parameter n steps along sum_r weights[r] * rows[r][n]."""

    def of(self, indices: Sequence[int]) -> "Part":
        """Those of some parameters. Nothing is copied from the host."""
        if len(indices) == len(self.params):
            return self
        weights = self.weights
        chosen = weights if weights.dim() == 1 else torch.stack([weights[n] for n in indices])
        return Part([self.params[n] for n in indices], [[row[n] for n in indices] for row in self.rows], chosen)


class _Call(NamedTuple):
    """An op on parameters of one group."""

    op: Callable[..., None]
    part: Part
    states: dict[str, list[Tensor]]
    """Lists of N tensors, by their names in the optimizer's state."""
    steps: list[Tensor]
    arguments: dict[str, Any]

    def tensors(self) -> list[list[Tensor]]:
        """What it writes, on this rank."""
        return [[local(t) for t in tensors] for tensors in (self.part.params, *self.states.values())]

    def check(self, name: Callable[[Tensor], str]) -> None:
        """Raises a ``ValueError`` for what the op refuses, but for shared memory; ``name`` names a parameter."""
        device = self.part.weights.device
        lists: dict[str, Sequence[Tensor | None]] = dict(zip(["params", *self.states], self.tensors(), strict=True))
        lists |= {f"gradients[{r}]": row for r, row in enumerate(self.part.rows)}
        there = {of: tensors for of, tensors in lists.items() if tensors}
        check_gradients(list(there.values()), names=list(there))
        for param in self.part.params:
            if param.device != device:
                raise ValueError(
                    f"the {name(param)} is on {param.device}, others are on {device}; keep all on one, or pass fused=False."
                )

    def __call__(self, skip: Tensor | None) -> None:
        steps = [[step.to(torch.float32) for step in self.steps]] if self.steps else []
        self.op(*self.tensors(), *steps, self.part.rows, self.part.weights, skip=skip, **self.arguments)


class Finish:
    """A step of the optimizer without the combined gradient: what reads the task gradients updates parameters and state.

    Hooks, profiler and schedulers see a step of the optimizer. Its state is what its own step would have made, so that the two
    take turns; but ``step`` is on the parameter's device whatever ``capturable`` says, since a step that is skipped there does
    not count.

    Args:
        owner: whose torch optimizer is meant.
        method: its weighting.
        per: its granularity.

    Raises:
        ValueError: something that rules it out; the message names it and the fix.
    """

    def __init__(self, owner: "MultiTaskOptimizer", method: Weighting | Elementwise, per: object) -> None:
        if type(owner.optimizer) not in KINDS:
            kind = type(owner.optimizer).__name__
            advice = ", or keep parameters in float32 and compute in torch.autocast" if kind == "MasterWeights" else ""
            raise ValueError(
                f"fused is True, which has the steps of torch.optim.SGD, Adam and AdamW, but not that of {kind}; pass "
                f"fused=False{advice}."
            )
        _check_fusible(method, per, owner.ranks)
        self.owner = owner
        self._checked: list[Tensor] = []
        self._check_options()

    @torch.no_grad()
    def update(self, info: StepInfo, *parts: Part, factor: Tensor | None = None) -> StepInfo:
        """Ends the owner's update: steps every parameter that has a gradient, unless ``info.skipped``. ``.grad`` is None then.

        In the first step of an SGD with dampened momentum, which alone is not dampened, the host reads whether it is skipped.

        Args:
            info: of the update.
            parts: no parameter is in two of them.
            factor: what the weights are to be divided by; None: 1.

        Raises:
            ValueError: an option that cannot be honoured, or a state that does not fit; no parameter and no state has changed.
        """
        inner: Any = self.owner.optimizer
        patched = vars(inner).get("step")
        if patched is not None and not hasattr(patched, "_wrapped_by_lr_sched"):
            raise ValueError(
                "fused is True, but optimizer.step has been replaced, perhaps by torch.compile, and would not be called; leave "
                "it as it is, or pass fused=False."
            )
        for param in self.owner.params:
            param.grad = None
        scaled = parts if factor is None else [part._replace(weights=part.weights / factor) for part in parts]
        skip = None if self.owner.on_nonfinite == "raise" else info.skipped

        @torch.optim.Optimizer.profile_hook_step
        def step(_: torch.optim.Optimizer) -> int:
            return self._step(scaled, skip)

        info.host_reads += step(inner)
        inner._opt_called = True  # what a scheduler's patch of its step notes
        self.owner._note(info, None, scaled=False)
        return info

    def _check_options(self) -> None:
        for g, group in enumerate(self.owner.optimizer.param_groups):
            if group.get("differentiable"):
                raise ValueError(
                    f"fused is True, but param_groups[{g}]['differentiable'] is, too, and its step has no derivative; pass "
                    "differentiable=False, or fused=False."
                )

    def _step(self, parts: Sequence[Part], skip: Tensor | None) -> int:
        """Returns how many host reads it took."""
        self._check_options()
        new: dict[Tensor, dict[str, Tensor]] = {}
        calls = self._calls(parts, new)
        self._check(calls)
        reads = 0
        if skip is not None and any(call.arguments.get("first") and call.arguments["dampening"] != 0 for call in calls):
            reads = 1
            if bool(skip):
                return reads
        steps = [step for call in calls for step in call.steps]
        one = torch.ones((), device=parts[0].weights.device) if skip is None else (~skip).float()
        counted = [one] * len(steps)
        if steps:
            torch._foreach_add_(steps, counted)
        try:
            for call in calls:
                call(skip)
        except BaseException:
            if steps:
                torch._foreach_sub_(steps, counted)
            raise
        for param, entries in new.items():
            self.owner.optimizer.state[param].update(entries)
        return reads

    def _calls(self, parts: Sequence[Part], new: dict[Tensor, dict[str, Tensor]]) -> list[_Call]:
        """What is to be done; ``new`` gets the entries that the state lacks."""
        groups = self.owner.optimizer.param_groups
        place = {id(p): g for g, group in enumerate(groups) for p in group["params"]}
        rates = [_rate(group["lr"], parts[0].weights.device) for group in groups]
        make = self._sgd if isinstance(self.owner.optimizer, torch.optim.SGD) else self._adam
        calls = []
        for part in parts:
            members: dict[int, list[int]] = defaultdict(list)
            for n, column in enumerate(zip(*part.rows, strict=True)):
                if any(row is not None for row in column):
                    members[place[id(part.params[n])]].append(n)
            for g, indices in members.items():
                calls += make(part.of(indices), groups[g], rates[g], new)
        return calls

    def _sgd(self, part: Part, group: Mapping[str, Any], lr: Tensor, new: dict[Tensor, dict[str, Tensor]]) -> list[_Call]:
        numbers = {name: _number(group, name) for name in ("momentum", "dampening", "weight_decay")}
        options = {"lr": lr, **numbers, "nesterov": group["nesterov"], "maximize": group["maximize"]}
        if numbers["momentum"] == 0:
            return [_Call(combine_sgd_, part, {"momentum_buffer": []}, [], options)]
        kept = [self.owner.optimizer.state.get(p, {}).get("momentum_buffer") for p in part.params]
        calls = []
        for first in (False, True):
            indices = [n for n, buffer in enumerate(kept) if (buffer is None) == first]
            if not indices:
                continue
            own = part.of(indices)
            if first:
                # Zeros: should this step be skipped on the device, the next one makes of them what a first step would have.
                buffers = [torch.zeros_like(p) for p in own.params]
                new |= {p: {"momentum_buffer": buffer} for p, buffer in zip(own.params, buffers, strict=True)}
            else:
                buffers = [cast(Tensor, kept[n]) for n in indices]
            calls.append(_Call(combine_sgd_, own, {"momentum_buffer": buffers}, [], {**options, "first": first}))
        return calls

    def _adam(self, part: Part, group: Mapping[str, Any], lr: Tensor, new: dict[Tensor, dict[str, Tensor]]) -> list[_Call]:
        amsgrad = group["amsgrad"]
        beta1, beta2 = (_number(group, "betas", i) for i in range(2))
        options = {
            "lr": lr,
            "beta1": beta1,
            "beta2": beta2,
            "eps": _number(group, "eps"),
            "weight_decay": _number(group, "weight_decay"),
            "decoupled": group["decoupled_weight_decay"],
            "amsgrad": amsgrad,
            "maximize": group["maximize"],
        }
        names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if amsgrad else [])]
        kept = [self._adam_state(p, names, new) for p in part.params]
        states = {name: [entries[name] for entries in kept] for name in names}
        states.setdefault("max_exp_avg_sq", [])
        return [_Call(combine_adam_, part, states, [entries["step"] for entries in kept], options)]

    def _adam_state(self, param: Tensor, names: Sequence[str], new: dict[Tensor, dict[str, Tensor]]) -> dict[str, Tensor]:
        entries: dict[str, Tensor] = self.owner.optimizer.state.get(param, {})
        if not entries:
            zeros = {name: torch.zeros_like(param) for name in names}
            new[param] = entries = {"step": torch.zeros((), dtype=torch.float32, device=param.device), **zeros}
        missing = [name for name in ("step", *names) if name not in entries]
        if missing:
            raise ValueError(
                f"the state of the {self.owner.name_of(param)} has no {missing[0]}, as that of another optimizer, or of one "
                "without amsgrad; keep the options that it was made with, or clear it with optimizer.state.clear()."
            )
        if entries["step"].device != param.device:
            new[param] = {"step": entries["step"].to(param.device, non_blocking=True)}
            entries = {**entries, **new[param]}
        return entries

    def _check(self, calls: Sequence[_Call]) -> None:
        """Checks all calls before the first one writes, where they have other tensors than the last time."""
        tensors = [t for call in calls for kept in (call.part.params, *call.states.values()) for t in kept]
        if len(tensors) != len(self._checked) or not all(map(operator.is_, tensors, self._checked)):
            for call in calls:
                call.check(self.owner.name_of)
            self._checked = tensors


def _check_fusible(method: Weighting | Elementwise, per: object, ranks: Ranks) -> None:
    """Raises a ``ValueError`` for what ``fused=True`` of :class:`MultiTaskOptimizer` rules out."""
    if isinstance(method, (Elementwise, MemoryWeighting)):
        raise ValueError(
            f"fused is True, but {type(method).__name__} has no weights of the gradients to step along; pass fused=False."
        )
    if per == "channel":
        raise ValueError(
            'fused is True, and per="channel" has other weights in every row of a tensor; pass per="tensor" or "model", or '
            "fused=False."
        )
    if ranks.communicates:
        raise ValueError(
            "fused is True, but a rank has a part of the gradients of parameters that every rank holds; shard them with "
            "fully_shard, or pass fused=False."
        )


def _rate(lr: Any, device: torch.device) -> Tensor:
    """float64 scalar on the device, without a copy that the host waits for."""
    if isinstance(lr, Tensor):
        return lr.detach().reshape(()).to(device, torch.float64, non_blocking=True)
    return torch.full((), lr, dtype=torch.float64, device=device)


def _number(group: Mapping[str, Any], name: str, index: int | None = None) -> float:
    value = group[name] if index is None else group[name][index]
    if isinstance(value, Tensor) and value.device.type != "cpu":
        place = name if index is None else f"{name}[{index}]"
        raise ValueError(f"{place} is a tensor on {value.device}, where the host would read it; pass a number, or fused=False.")
    return float(value)
