"""Loads the compiled library and defines ops: schema, fake, reference and autograd rule of an op in one call."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checks

NAMESPACE = "mtlkernels"
PACKAGE = Path(__file__).parent

_library = torch.library.Library(NAMESPACE, "DEF")  # lives as long as the process
REFERENCES: dict[str, Callable[..., Any]] = {}
"""Op name -> reference implementation with the op's own signature."""


def _load(name: str, problem: str | None) -> tuple[bool, str]:
    """Loads a compiled library unless there is a ``problem``; returns whether it is there, and its path or why it is not."""
    if os.environ.get("MTLKERNELS_DISABLE_C", "0") not in ("", "0"):
        return False, "switched off by the environment variable MTLKERNELS_DISABLE_C"
    library = next(PACKAGE.glob(f"{name}.abi3.*so"), None)
    if library is None:
        note = PACKAGE / "_build.json"
        notes = json.loads(note.read_text()) if note.exists() else {}
        default = "not built: install from source with a C++17 compiler (pip install --no-build-isolation .)"
        return False, notes.get(name, default)
    if problem is not None:
        return False, problem
    torch.ops.load_library(str(library))
    return True, str(library)


HAS_CPU_LIBRARY, CPU_LIBRARY = _load("_C", None)
HAS_CUDA_LIBRARY, CUDA_LIBRARY = _load(
    "_C_cuda", None if torch.version.cuda else "built, but this torch has no CUDA; install a CUDA build of torch to use it"
)


def define(
    schema: str,
    *,
    fake: Callable[..., Any],
    reference: Callable[..., Any],
    autograd: Callable[..., Any] | None = None,
) -> None:
    """Defines an op of this package.

    The reference serves every device that has no kernel. Kernels for the CPU and CUDA are registered by the compiled
    libraries under the same name.

    Args:
        schema: the op's schema without the namespace.
        fake: shapes and dtypes of the results, for tracing.
        reference: the implementation in PyTorch, with the op's flat signature.
        autograd: the op for inputs that require grad. An op without one raises then, instead of detaching in silence.
    """
    name = schema[: schema.index("(")]
    qualified = f"{NAMESPACE}::{name}"
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_library)
    REFERENCES[name] = reference
    for key in ("Negative", "ZeroTensor"):  # torch materializes these lazy tensors in Tensor[] itself, but not in Tensor?[]
        _library.impl(name, _materializing(name), key)
    _library.impl(name, _refusing_autograd(name) if autograd is None else autograd, "Autograd")


def _refusing_autograd(name: str) -> Callable[..., Any]:
    op = getattr(torch.ops.mtlkernels, name).default
    mutable = op._schema.is_mutable

    def refuse(*args: Any) -> Any:
        checks.refuse_grad(_tensors(args), name)
        with torch._C._AutoDispatchBelowAutograd():
            result = op(*args)
        if mutable:
            torch.autograd.graph.increment_version(args[0])
        return result

    return refuse


def _materializing(name: str) -> Callable[..., Any]:
    """Calls the op with the memory of negated views and of tensors without memory filled in."""
    op = getattr(torch.ops.mtlkernels, name).default
    mutable = op._schema.is_mutable

    def materialize(*args: Any) -> Any:
        if mutable and any(t.is_neg() or t._is_zerotensor() for t in args[0]):
            raise ValueError("out holds a negated view or a tensor without memory; pass out[n].clone().")
        return op(*[[_plain(t) for t in arg] if isinstance(arg, (list, tuple)) else _plain(arg) for arg in args])

    return materialize


def _plain(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.zeros_like(value) if value._is_zerotensor() else value.resolve_neg()


def _tensors(args: Sequence[Any]) -> list[Tensor]:
    flat = []
    for arg in args:
        flat += (
            [t for t in arg if isinstance(t, Tensor)]
            if isinstance(arg, (list, tuple))
            else [arg]
            if isinstance(arg, Tensor)
            else []
        )
    return flat
