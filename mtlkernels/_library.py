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


def _load() -> tuple[bool, str]:
    """Loads ``_C``; returns whether it is there and, if not, why and what to do."""
    reason = os.environ.get("MTLKERNELS_DISABLE_C", "")
    if reason not in ("", "0"):
        return False, "switched off by the environment variable MTLKERNELS_DISABLE_C"
    library = next(PACKAGE.glob("_C.abi3.*"), None) or next(PACKAGE.glob("_C.*so"), None)
    if library is None:
        note = PACKAGE / "_build.json"
        built = json.loads(note.read_text()) if note.exists() else {}
        return False, built.get("cpu", "not built: install from source with a C++17 compiler (pip install --no-build-isolation .)")
    torch.ops.load_library(str(library))
    return True, str(library)


HAS_CPU_LIBRARY, CPU_LIBRARY = _load()


def define(
    schema: str,
    *,
    fake: Callable[..., Any],
    reference: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> None:
    """Defines an op of this package.

    The reference serves every device that has no kernel. Kernels for the CPU and CUDA are registered by the compiled
    libraries under the same name.

    Args:
        schema: the op's schema without the namespace.
        fake: shapes and dtypes of the results, for tracing.
        reference: the implementation in PyTorch, with the op's flat signature.
        backward, setup_context: the derivative, as for ``torch.library.register_autograd``. An op without one raises
            when an input requires grad, instead of detaching in silence.
    """
    name = schema[: schema.index("(")]
    qualified = f"{NAMESPACE}::{name}"
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_library)
    REFERENCES[name] = reference
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_library)
    else:
        _library.impl(name, _refusing_autograd(name), "Autograd")


def _refusing_autograd(name: str) -> Callable[..., Any]:
    op = getattr(torch.ops.mtlkernels, name).default

    def refuse(*args: Any) -> Any:
        checks.refuse_grad(_tensors(args), name)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return refuse


def _tensors(args: Sequence[Any]) -> list[Tensor]:
    flat = []
    for arg in args:
        flat += [t for t in arg if isinstance(t, Tensor)] if isinstance(arg, (list, tuple)) else [arg] if isinstance(arg, Tensor) else []
    return flat
