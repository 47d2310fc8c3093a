"""The compiled library: what it is linked to, each instruction set, and how it is switched."""

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mtlkernels
from mtlkernels import _library, dispatch

OPS = {
    "gram",
    "cross_gram",
    "combine",
    "combine_",
    "gram_combine_",
    "combine_channels",
    "combine_channels_",
    "mix",
    "connection_strength",
    "priority_combine",
    "priority_combine_",
    "graddrop",
    "graddrop_",
    "trimmed_mean",
    "trimmed_mean_",
    "gradient_dropout",
    "gradient_dropout_",
    "paired_gram",
    "perturb_",
    "memory_combine_",
    "combine_sgd_",
    "combine_adam_",
    "excess_risk",
    "cosine",
    "magnitude_similarity",
    "conflict_rate",
    "condition_number",
    "projection_coefficients",
    "pcgrad_weights",
    "mgda_weights",
    "cagrad_weights",
    "config_weights",
    "conicgrad_weights",
    "imtl_g_weights",
    "aligned_mtl_weights",
    "fairgrad_weights",
    "gradvac_weights",
    "dualproj_weights",
    "pcd_weights",
    "upgrad_weights",
    "affinity_propagation",
    "proximal_affinity_",
    "proximal_groups",
}
COMPILED = {
    "gram", "cross_gram", "paired_gram", "combine", "combine_", "combine_channels", "combine_channels_", "mix", "perturb_",
    "memory_combine_", "excess_risk", "gram_combine_",
}  # fmt: skip


def undefined_symbols(library: str) -> set[str]:
    """Names that a 64-bit little-endian ELF file wants from others: the entries of .dynsym with section index 0."""
    data = Path(library).read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01"
    (offset,) = struct.unpack_from("<Q", data, 0x28)
    entry_size, count = struct.unpack_from("<HH", data, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, offset + i * entry_size) for i in range(count)]
    names = set()
    for _, kind, _, _, start, size, link, _, _, entry in sections:
        if kind != 11:  # SHT_DYNSYM
            continue
        strings = sections[link][4]
        for at in range(start, start + size, entry):
            name, _, _, section = struct.unpack_from("<IBBH", data, at)
            if section == 0 and name:
                names.add(data[strings + name : data.index(b"\0", strings + name)].decode())
    return names


def is_unstable(symbol: str) -> bool:
    """Whether a symbol is PyTorch's or Python's, and not of the stable C interface (aoti_torch_*, torch_*)."""
    if symbol.startswith(("aoti_torch_", "torch_")):
        return False
    mangled = symbol.startswith("_Z") and any(f"{len(word)}{word}" in symbol for word in ("c10", "at", "torch", "caffe2"))
    return mangled or symbol.startswith(("Py", "_Py", "THP", "THC", "aoti_", "AOTI"))


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads ELF")


@on_linux
@pytest.mark.parametrize("name", ["_C", "_C_cuda"])
def test_library_needs_the_stable_interface_only(name):
    library = next(_library.PACKAGE.glob(f"{name}.abi3.*so"), None)
    if library is None:
        pytest.skip(f"{name} is not built here")
    symbols = undefined_symbols(str(library))
    assert {"aoti_torch_get_data_ptr", "aoti_torch_get_sizes"} <= symbols
    assert not {symbol for symbol in symbols if is_unstable(symbol)}
    # Everything else comes from the C and C++ run-time libraries.
    needs_torch = {symbol for symbol in symbols if "torch" in symbol}
    assert all(symbol.startswith(("aoti_torch_", "torch_")) for symbol in needs_torch)


@on_linux
def test_the_symbol_check_sees_unstable_symbols():
    """torch's own Python module is full of what the library must not have."""
    directory = Path(torch.__file__).parent / "lib"
    unstable = {symbol for symbol in undefined_symbols(str(directory / "libtorch_python.so")) if is_unstable(symbol)}
    assert any(symbol.startswith("Py") for symbol in unstable)
    assert any("3c10" in symbol for symbol in unstable)
    assert any("2at" in symbol for symbol in unstable)


def test_ops_are_registered():
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("mtlkernels::")}
    assert registered == OPS
    assert set(_library.REFERENCES) == OPS
    for name in OPS:
        schema = getattr(torch.ops.mtlkernels, name).default._schema
        assert schema.is_mutable == name.endswith("_")
        assert torch.Tag.pt2_compliant_tag in getattr(torch.ops.mtlkernels, name).default.tags


def test_compiled_ops_have_cpu_kernels(cpu_library):
    for name in COMPILED:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mtlkernels::{name}", "CPU")
        assert dispatch.backend(name, "cpu") == "cpp"


def test_use_backend():
    before = dispatch.backend("gram", "cpu")
    with mtlkernels.use_backend("reference"):
        assert dispatch.backend("gram", "cpu") == "reference"
    assert dispatch.backend("gram", "cpu") == before
    with (
        pytest.raises(ValueError, match=r"backend 'cuda' is unknown; known are cpp, reference"),
        mtlkernels.use_backend("cuda"),
    ):
        pass
    with pytest.raises(ValueError, match=r"op 'grams' is unknown; known are .*gram"):
        dispatch.backend("grams", "cpu")


def test_use_backend_reaches_the_other_implementation(cpu_library):
    """A long float32 sum differs in its last bits between float64 throughout and float32 blocks."""
    grads = torch.randn(2, 10_000, generator=torch.Generator().manual_seed(0))
    compiled = mtlkernels.gram(grads)
    with mtlkernels.use_backend("reference"):
        assert not torch.equal(mtlkernels.gram(grads), compiled)
    with mtlkernels.use_backend("cpp"):
        assert torch.equal(mtlkernels.gram(grads), compiled)


# --- in a process of its own --------------------------------------------------------------------------------------------

CHECK = """
import sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import mtlkernels as mtl
from mtlkernels import dispatch
from helpers import DTYPES, LAYOUTS, NUM_TASKS, assert_combined, assert_gram, random_gradients

for dtype in DTYPES:
    for num_tasks in NUM_TASKS:
        numel = 4099 if num_tasks < 12 else 531
        grads = random_gradients(num_tasks, [(numel,), (33, 5), (7,), ()], dtype)
        for k in range(0, num_tasks, 2):
            grads[k][1] = LAYOUTS["transposed"](grads[k][1])
        weights = torch.linspace(-1, 2, num_tasks, dtype=torch.float64)
        for per in ("model", "tensor", "channel"):
            assert_gram(mtl.gram(grads, per=per), grads, per=per)
        assert_gram(mtl.gram(grads, grads[:3]), grads, grads[:3])
        assert_combined(mtl.combine(grads, weights), grads, weights)
        for row, w in zip(mtl.mix(grads, torch.stack([weights, -weights, weights / 3])), (weights, -weights, weights / 3)):
            assert_combined(row, grads, w)
for scale in (1e-40, 1e-25, 1e30):
    grads = random_gradients(3, [(1003,), (31, 3)], scale=scale)
    assert_gram(mtl.gram(grads), grads)
print(dispatch.cpu_capability(), dispatch.backend("gram", "cpu"))
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    root = Path(mtlkernels.__file__).parent.parent
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MTLKERNELS_")}
    paths = os.pathsep.join([str(root), clean.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def has(feature: str) -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return feature == "baseline" or (
        cpuinfo.exists() and {"avx512": "avx512f"}.get(feature, feature) in cpuinfo.read_text().split()
    )


@pytest.mark.parametrize("capability", dispatch.CAPABILITIES)
def test_each_instruction_set_is_right(cpu_library, capability):
    if not has(capability):
        pytest.skip(f"this processor has no {capability}")
    result = run(CHECK.format(tests=str(Path(__file__).parent)), MTLKERNELS_CPU_CAPABILITY=capability)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [capability, "cpp"]


def test_unknown_instruction_set(cpu_library):
    result = run("import mtlkernels", MTLKERNELS_CPU_CAPABILITY="avx9000")
    assert result.returncode != 0
    assert "MTLKERNELS_CPU_CAPABILITY is 'avx9000'" in result.stderr
    for known in dispatch.CAPABILITIES:
        assert known in result.stderr


def test_switched_off():
    code = """
import torch, mtlkernels
from mtlkernels import _library, dispatch
assert not _library.HAS_CPU_LIBRARY and "MTLKERNELS_DISABLE_C" in _library.CPU_LIBRARY
assert dispatch.cpu_capability() is None and dispatch.backend("gram", "cpu") == "reference"
x = torch.arange(6.0).view(2, 3)
assert torch.equal(mtlkernels.gram(x), (x @ x.T).double())
assert torch.equal(mtlkernels.combine(x, torch.tensor([1.0, -1.0]))[0], x[0] - x[1])
try:
    with mtlkernels.use_backend("cpp"):
        pass
except RuntimeError as error:
    print(error)
"""
    result = run(code, MTLKERNELS_DISABLE_C="1")
    assert result.returncode == 0, result.stderr
    assert "MTLKERNELS_DISABLE_C" in result.stdout


def test_capability_is_not_read_when_switched_off():
    result = run("import mtlkernels", MTLKERNELS_DISABLE_C="1", MTLKERNELS_CPU_CAPABILITY="avx9000")
    assert result.returncode == 0, result.stderr
