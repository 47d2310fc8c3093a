"""A model's shared norms to task norms, and back for one task."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .context import Task, index_of
from .norms import TaskBatchNorm1d, TaskBatchNorm2d, TaskBatchNorm3d, TaskLayerNorm, TaskNorm, TaskRMSNorm, task_tuple

BATCH_NORMS: dict[type[nn.Module], type[TaskNorm]] = {
    nn.BatchNorm1d: TaskBatchNorm1d,
    nn.BatchNorm2d: TaskBatchNorm2d,
    nn.BatchNorm3d: TaskBatchNorm3d,
}
LAYER_NORMS: dict[type[nn.Module], type[TaskNorm]] = {nn.LayerNorm: TaskLayerNorm, nn.RMSNorm: TaskRMSNorm}
SHARED: dict[type[TaskNorm], type[nn.Module]] = {new: old for old, new in (BATCH_NORMS | LAYER_NORMS).items()}


def to_task_norms(model: nn.Module, tasks: int | Iterable[Task], *, layer_norms: bool = False) -> nn.Module:
    """Replaces every shared batch norm of a model by a task norm, in place; every task starts as a copy of the shared norm.

    Convert before the optimizer is made, since the parameters are new ones, and convert the shared part only
    (``to_task_norms(model.encoder, tasks)``) where heads have norms of their own. State dicts of the model before conversion
    load into it after.

    Args:
        model: any module; returned itself, or its replacement where it is a norm.
        tasks: K names, or K for the names 0 .. K-1.
        layer_norms: whether layer and RMS norms are replaced, too; an extension of ours to the paper.

    Raises:
        ValueError: names that are not unique, no norm to replace, a SyncBatchNorm, an uninitialised lazy norm, a norm with
            hooks or a subclass of a norm, which a replacement would lose. Nothing is replaced then.
    """
    names = task_tuple(tasks)
    kinds = BATCH_NORMS | (LAYER_NORMS if layer_norms else {})

    def convert(norm: nn.Module) -> nn.Module:
        new = _like(kinds[type(norm)], norm, names)
        new.load_state_dict(norm.state_dict())
        for name in ("weight", "bias"):
            for param in getattr(new, name, None) or ():
                param.requires_grad_(getattr(norm, name).requires_grad)
        return new

    found = [(path, norm) for path, norm in model.named_modules() if _is_norm(path, norm, kinds)]
    if not found:
        raise ValueError(
            f"model, a {type(model).__name__}, has no shared batch norm to replace"
            + ("." if layer_norms else "; pass layer_norms=True where it has layer norms.")
        )
    return _replaced(model, found, convert)


def from_task_norms(model: nn.Module, task: Task) -> nn.Module:
    """Replaces every task norm of a model by a shared norm with the values of one task, in place: a plain single-task model.

    Args:
        model: any module; returned itself, or its replacement where it is a norm.
        task: the task, or its index where the names are no integers.

    Raises:
        ValueError: a task norm does not know the task; nothing is replaced then.
    """

    def convert(norm: nn.Module) -> nn.Module:
        assert isinstance(norm, TaskNorm)
        k = index_of(task, norm.tasks, type(norm).__name__)
        new = _like(SHARED[type(norm)], norm)
        state = {name: value[k] for name, value in norm.named_buffers(recurse=False)}
        state |= {name: value for name, value in zip(("weight", "bias"), norm.affine_of(k), strict=True) if value is not None}
        new.load_state_dict(state)
        for name in ("weight", "bias"):
            if state.get(name) is not None:
                getattr(new, name).requires_grad_(state[name].requires_grad)
        return new

    found: list[tuple[str, nn.Module]] = list(task_norms(model))
    for path, norm in task_norms(model):
        index_of(task, norm.tasks, f"the {type(norm).__name__} {path!r}")
    return _replaced(model, found, convert)


def task_norms(model: nn.Module) -> Iterator[tuple[str, TaskNorm]]:
    """The task norms of a model, with their names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, TaskNorm))


def _is_norm(path: str, module: nn.Module, kinds: dict[type[nn.Module], type[TaskNorm]]) -> bool:
    name = f"model.{path}" if path else "model"
    if isinstance(module, nn.SyncBatchNorm):
        raise ValueError(
            f"{name} is a SyncBatchNorm, whose statistics over several processes have no task norm in this version; build the "
            "model with BatchNorm layers."
        )
    if not isinstance(module, (_BatchNorm, *kinds)):
        return False
    if type(module) not in kinds or getattr(module, "has_uninitialized_params", bool)():
        raise ValueError(
            f"{name} is a {type(module).__name__}, of which no task norm is known; run lazy layers once before, and replace "
            "subclasses by torch's own layers."
        )
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        raise ValueError(f"{name} has hooks, which its replacement would lose; remove them and register them again after.")
    return True


def _like(kind: type[nn.Module], norm: nn.Module, tasks: tuple[Task, ...] | None = None) -> nn.Module:
    """A norm of another kind with the options of ``norm``, on its device and in its dtype and mode."""
    example = next((t for t in (*norm.parameters(), *norm.buffers()) if t.is_floating_point()), None)
    places = {} if example is None else {"device": example.device, "dtype": example.dtype}
    arguments = () if tasks is None else (tasks,)
    if hasattr(norm, "track_running_stats"):
        options = {name: getattr(norm, name) for name in ("eps", "momentum", "affine", "track_running_stats")}
        new = kind(norm.num_features, *arguments, **options, **places)
    else:
        shape = norm.shape if isinstance(norm, TaskNorm) else norm.normalized_shape
        options = {"eps": norm.eps, "elementwise_affine": norm.weight is not None}
        if issubclass(kind, (nn.LayerNorm, TaskLayerNorm)) and not issubclass(kind, TaskRMSNorm):
            options["bias"] = norm.bias is not None
        new = kind(shape, *arguments, **options, **places)
    return new.train(norm.training)


def _replaced(model: nn.Module, found: list[tuple[str, nn.Module]], convert: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """The model with each found norm converted, wherever it is registered."""
    with torch.no_grad():
        new = {id(norm): convert(norm) for _, norm in found}
    if id(model) in new:
        return new[id(model)]
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if id(child) in new:
                module._modules[name] = new[id(child)]
    return model
