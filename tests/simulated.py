"""CUDA on the CPU: the library's own launchers and CUDA bindings run on CPU tensors, their kernels in ptxsim.

One shared library is built from csrc/cuda, csrc/common and the CUDA bindings as they are, linked with
csrc/testing/fake_cuda.cpp in place of the CUDA runtime. Inside ``with simulated_cuda() as device`` every op that has a CUDA
kernel takes CPU tensors for CUDA ones. Each launch is checked as a GPU and its driver would: sizes of grid, block and shared
memory, the current device and stream, and every memory access, against the exact bounds of the tensors that the op was given
and of those that it allocated. Memory that an op allocates starts as NaN, and a kernel that reads it before it is written is
an error.
"""

import ctypes
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import filelock
import ptxsim
import torch
from device import CSRC, ROOT, setup_script
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mtlkernels._library import NAMESPACE, REFERENCES

KEY = "PrivateUse1"
"""The dispatch key of the library as it is."""
ARCHITECTURE = "90"
TENSOR_DEVICE = 1
"""Index of the device that tensors pass for; not the current device, so that a missing device guard shows."""
UNASKED_SHARED_BYTES = 48 * 1024
"""Shared memory that a block gets without cudaFuncSetAttribute."""
MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_BLOCK = (1024, 1024, 64)

HOST_READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""Tags of the torch ops whose result, or its size, the host learns from the device's values."""

# cudaError_t
INVALID_VALUE, INVALID_CONFIGURATION, INVALID_RESOURCE_HANDLE, LAUNCH_OUT_OF_RESOURCES, UNKNOWN = 1, 9, 400, 701, 999

WRAPPED = [  # functions of torch's shim that fake_cuda.cpp stands in for
    "aoti_torch_library_init_impl",
    "aoti_torch_get_device_index",
    "aoti_torch_get_device_type",
    "aoti_torch_get_current_cuda_stream",
    "aoti_torch_create_device_guard",
    "aoti_torch_delete_device_guard",
]


# --- the library --------------------------------------------------------------------------------------------------------------


class Library:
    """The simulated library, or a copy of it with faults planted.

    Args:
        key: the dispatch key that its ops are registered under; one per library of a process.
        faults: (path under csrc, regular expression, replacement) for each. In a replacement, ``fault("name")`` is true while
            the environment variable PLANTED_FAULT is that name.
    """

    def __init__(self, key: str, faults: Sequence[tuple[str, str, str]] = ()) -> None:
        self.key = key
        path = _build(key, faults)
        torch.ops.load_library(str(path))
        self.c = ctypes.CDLL(str(path))
        self.c.fake_cuda_stream.restype = ctypes.c_void_p
        texts = re.findall(rb"\.version [^\0]+", path.read_bytes())  # the PTX of each source, not compressed
        self.kernels = {name: module for module in (ptxsim.from_ptx(text.decode()) for text in texts) for name in module.names}
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        self.ops = [op for op in REFERENCES if has_kernel(f"{NAMESPACE}::{op}", key)]


@cache
def library() -> Library:
    """The library as it is."""
    return Library(KEY)


def _build(key: str, faults: Sequence[tuple[str, str, str]]) -> Path:
    """Compiles what changed, by ninja and with the flags of setup.py; processes wait for each other."""
    setup = setup_script()
    root = ROOT / "build/testing" / f"simulated-{torch.__version__}"
    folder, target = root / key, root / f"{key}.so"
    folder.mkdir(parents=True, exist_ok=True)
    wrap = " ".join(f"-Wl,--wrap={name}" for name in WRAPPED)
    ninja = setup["NinjaFile"](setup["find_compiler"](), Path(torch.__file__).parent, wrap)
    ninja.rule("nvcc", f"{shutil.which('nvcc')} $flags -MMD -MF $out.d -c $in -o $out", "depfile = $out.d", "deps = gcc")
    architecture = f"-gencode=arch=compute_{ARCHITECTURE},code=compute_{ARCHITECTURE} --no-compress"
    device = f"-std=c++17 -O3 -DNDEBUG {architecture} -Xcompiler -fPIC,-fvisibility=hidden"
    with filelock.FileLock(root / "lock"):
        sources = sorted((CSRC / "cuda").glob("*.cu")) + setup["bindings"]("cuda") + sorted((CSRC / "common").glob("*.cpp"))
        for source in sources:
            name = f"{source.stem}.cu.o" if source.suffix == ".cu" else f"{source.stem}.o"
            planted = [(pattern, text) for path, pattern, text in faults if CSRC / path == source]
            if faults and not planted:
                ninja.objects.append(f"../{KEY}/{name}")
                continue
            own = " ".join([f"-I{source.parent}", *setup["FLAGS"].get(source.relative_to(ROOT).as_posix(), [])])
            changed = _plant(source, planted, folder) if planted else source
            if source.suffix == ".cu":
                ninja.compile(changed, name, f"{device} {own}", rule="nvcc")
            else:
                ninja.compile(changed, name, f"$torch -DUSE_CUDA {own}")
        runtime = CSRC / "testing/fake_cuda.cpp"
        ninja.compile(runtime, "fake_cuda.o", f'{device} -DFAKE_CUDA_KEY=\\"{key}\\"', rule="nvcc")
        ninja.link(target)
        ninja.run(folder)
    return target


def _plant(source: Path, faults: Sequence[tuple[str, str]], folder: Path) -> Path:
    """Writes a copy of a source with faults."""
    text = source.read_text()
    for pattern, replacement in faults:
        text, count = re.subn(pattern, replacement, text)
        assert count > 0, f"{pattern!r} does not occur in {source.name}; the fault cannot be planted"
    copy = folder / source.name
    text = FAULT + text
    if not copy.exists() or copy.read_text() != text:  # unchanged, it is not compiled again
        copy.write_text(text)
    return copy


FAULT = """#include <cstdlib>
#include <cstring>
static bool fault(const char* name) {
  const char* planted = std::getenv("PLANTED_FAULT");
  return planted && !std::strcmp(planted, name);
}
"""


# --- launches -----------------------------------------------------------------------------------------------------------------


class LaunchError(RuntimeError):
    """A launch that a GPU would refuse, or run at the wrong place. ``error`` is the cudaError_t."""

    def __init__(self, message: str, error: int) -> None:
        super().__init__(message)
        self.error = error


class _Call(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.c_char_p),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint64),
        ("shared_granted", ctypes.c_int64),
        ("stream", ctypes.c_void_p),
        ("device", ctypes.c_int32),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
    )


_ON_LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Call))


@dataclass
class Launch:
    """One kernel launch; ``kernel`` is the demangled name, ``report`` ptxsim's."""

    kernel: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared_bytes: int
    stream: int
    device: int
    report: "ptxsim.Report"


class _Allocations(TorchDispatchMode):
    """The memory that an op allocates through torch; notes a torch op that reads it on the host."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in given}
        self.memory: dict[int, Tensor] = {}  # address -> the bytes
        self.fresh: set[int] = set()  # addresses of memory that nothing has been written to
        self.problem: BaseException | None = None  # kept until the op returns: it must not pass through C

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if HOST_READS & set(func.tags):
            self.problem = LaunchError(f"the op calls {func}, for which the host waits", UNKNOWN)
        result = func(*args, **(kwargs or {}))
        if func._schema.is_mutable:
            self.fresh -= {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, Tensor)}
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, Tensor):
                self._add(tensor, empty="empty" in func._schema.name)
        return result

    def _add(self, tensor: Tensor, empty: bool) -> None:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if size == 0 or address in self.known:
            return
        self.known.add(address)
        self.memory[address] = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (size,))
        if empty:
            self.fresh.add(address)
            ctypes.memset(address, 0xFF, size)


class SimulatedCuda:
    """The simulated device; ``launches`` are the kernel launches of all ops so far, in order.

    Args:
        source: the library to run.
        seed: order of blocks and warps; None for ascending.
        fail: (number of the launch from 0, cudaError_t) of a launch that fails.
    """

    def __init__(self, source: Library, seed: int | None = None, fail: tuple[int, int] | None = None) -> None:
        self.library, self.seed, self.fail = source, seed, fail
        self.launches: list[Launch] = []
        self._attempts = 0
        self._callback = _ON_LAUNCH(self._on_launch)  # kept: C holds the pointer only
        self.places: dict[int, int] = {}

    def place(self, tensor: Tensor, device: int) -> None:
        """Lets a tensor pass for one of another device; -1 is the CPU."""
        self.places[tensor.data_ptr()] = device

    def kernel(self, op: str) -> Callable[..., Any]:
        """The op's CUDA implementation, for CPU tensors."""
        function = getattr(getattr(torch.ops, NAMESPACE), op).default
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, self.library.key))

        def run(*args: Any) -> Any:
            self.library.c.fake_cuda_begin(self._callback, TENSOR_DEVICE)
            for data, device in self.places.items():
                self.library.c.fake_cuda_place(ctypes.c_void_p(data), device)
            given = [t for arg in args for t in (arg if isinstance(arg, (list, tuple)) else [arg]) if isinstance(t, Tensor)]
            arguments = zip(function._schema.arguments, args, strict=False)
            written = [t for given, arg in arguments if given.alias_info and given.alias_info.is_write for t in arg]
            self._allocations = _Allocations(given)
            self._given = [t for t in given if t.numel() > 0 and t.data_ptr() not in self.places]
            self._readonly = [t for t in self._given if not any(_overlap(t, out) for out in written)]
            current = self.library.c.fake_cuda_device()
            try:
                with self._allocations:
                    result = function.redispatch(keys, *args)
            except RuntimeError:
                if self._allocations.problem is None:
                    raise
            if self._allocations.problem is not None:
                raise self._allocations.problem
            assert self.library.c.fake_cuda_device() == current, "the op left another device current"
            return result

        return run

    def _on_launch(self, call: Any) -> int:
        try:
            self._attempts += 1
            if self.fail is not None and self._attempts - 1 == self.fail[0]:
                return self.fail[1]
            self._launch(call.contents)
            return 0
        except BaseException as problem:
            self._allocations.problem = problem
            return problem.error if isinstance(problem, LaunchError) else UNKNOWN

    def _launch(self, call: Any) -> None:
        name = call.kernel.decode()
        module = self.library.kernels[name]
        kernel = module.kernel(name)
        grid, block = tuple(call.grid), tuple(call.block)
        self._check(call, kernel, grid, block)
        allocations = self._allocations
        arguments = [ctypes.string_at(call.arguments[i], parameter.size) for i, parameter in enumerate(kernel.params)]
        fresh = [allocations.memory[address] for address in sorted(allocations.fresh)]
        report = module.launch(
            name,
            grid=grid,
            block=block,
            shared=call.shared_bytes,
            args=arguments,
            mem=[*self._given, *allocations.memory.values()],
            outputs=fresh,
            readonly=self._readonly,
            **({} if self.seed is None else {"seed": self.seed}),
        )
        allocations.fresh -= {t.data_ptr() for t in fresh if report.alloc(t).store_bytes}
        self.launches.append(Launch(kernel.demangled, grid, block, call.shared_bytes, call.stream or 0, call.device, report))

    def _check(self, call: Any, kernel: "ptxsim.Kernel", grid: tuple[int, ...], block: tuple[int, ...]) -> None:
        what = f"{kernel.demangled} with grid {grid}, block {block}, {call.shared_bytes} bytes of shared memory"
        if not all(1 <= size <= limit for size, limit in zip(grid + block, MAX_GRID + MAX_BLOCK, strict=True)):
            raise LaunchError(f"{what}: a size is out of range", INVALID_CONFIGURATION)
        threads = block[0] * block[1] * block[2]
        bound = kernel.maxntid[0] * max(kernel.maxntid[1], 1) * max(kernel.maxntid[2], 1) or 1024
        if threads > bound:
            raise LaunchError(f"{what}: at most {bound} threads", LAUNCH_OUT_OF_RESOURCES)
        granted = call.shared_granted if call.shared_granted >= 0 else UNASKED_SHARED_BYTES - kernel.static_shared
        if call.shared_bytes > granted:
            raise LaunchError(f"{what}: not asked for by cudaFuncSetAttribute on device {call.device}", INVALID_VALUE)
        if call.device != TENSOR_DEVICE:
            message = f"{what}: device {call.device} is current, the tensors are on device {TENSOR_DEVICE}"
            raise LaunchError(message, INVALID_RESOURCE_HANDLE)
        if call.stream != self.library.c.fake_cuda_stream(call.device):
            stream = "the default stream" if not call.stream else f"stream {call.stream:#x}"
            raise LaunchError(f"{what}: launched on {stream}, not on the current one", INVALID_RESOURCE_HANDLE)


def _overlap(a: Tensor, b: Tensor) -> bool:
    (start, size, _), (other, other_size, _) = ptxsim.buffers.extent(a), ptxsim.buffers.extent(b)
    return start < other + other_size and other < start + size


@contextmanager
def simulated_cuda(
    source: Library | None = None, seed: int | None = None, fail: tuple[int, int] | None = None
) -> Iterator[SimulatedCuda]:
    """Runs the ops on CPU tensors by their CUDA implementation in a ``with`` block. Arguments as of :class:`SimulatedCuda`."""
    device = SimulatedCuda(source or library(), seed, fail)
    override = torch.library.Library(NAMESPACE, "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch tells of every override
            for op in device.library.ops:
                override.impl(op, device.kernel(op), "CPU", allow_override=True)
        yield device
    finally:
        override._destroy()
