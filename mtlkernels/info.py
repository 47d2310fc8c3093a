"""``python -m mtlkernels info``: what is installed, what runs where, and what is missing and how to get it.

Standard library and PyTorch only, so that it can report on everything else.
"""

import argparse
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from . import _library, dispatch
from ._version import __version__

Section = tuple[str, list[tuple[str, str]]]
"""A heading and its lines: what, and what was found."""

DEVICES = ("cpu", "cuda")
FEATURES = (
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512dq",
    "avx512vl",
    "avx512_bf16",
    "avx512_fp16",
    "asimd",
    "sve",
)
"""What the kernels or their readers ask for, in the words of /proc/cpuinfo."""
OPTIONAL = {
    "triton": "for GPUs without the compiled CUDA kernels: pip install triton; PyTorch's GPU builds bring it",
    "scikit-learn": "for data and demo: pip install scikit-learn",
    "matplotlib": "for plot and demo: pip install matplotlib",
    "rich": "for demo, and for tables of plan: pip install rich",
}
"""Package -> what to do where it is missing."""


def collect() -> list[Section]:
    """Everything the command prints, in order."""
    return [
        ("Versions", _versions()),
        ("Libraries", _libraries()),
        ("Backend of each op", _backends()),
        ("Processor", _processor()),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the sections as plain text."""
    argparse.ArgumentParser(prog="python -m mtlkernels info", description="What is installed and what runs where.").parse_args(
        argv
    )
    sections = collect()
    width = max(len(name) for _, lines in sections for name, _ in lines)
    for heading, lines in sections:
        print(heading)
        for name, value in lines:
            print(f"  {name:<{width}}  {value}")
        print()
    return 0


def _versions() -> list[tuple[str, str]]:
    build = (
        f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}" if torch.version.hip else "CPU only"
    )
    lines = [
        ("mtlkernels", f"{__version__} in {_library.PACKAGE}"),
        ("Python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", f"{torch.__version__}, built for {build}"),
        ("GPU", _gpu()),
        ("nvcc", _nvcc()),
        ("C++ compiler", _compiler()),
    ]
    for package, remedy in OPTIONAL.items():
        version = installed(package)
        lines.append((package, version if version else f"not installed ({remedy})"))
    return lines


def installed(package: str) -> str | None:
    """Version of an installed package, found without importing it; None where it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> str:
    if torch.cuda.is_available():
        return ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    if torch.version.cuda or torch.version.hip:
        return "none that torch can use (no device, or no driver)"
    return "none that torch can use (a CPU-only build of torch)"


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME")  # the order in which the build looks
    candidates = [os.environ.get("CUDACXX"), home and f"{home}/bin/nvcc", "nvcc", "/usr/local/cuda/bin/nvcc"]
    path = next((found for name in candidates if name and (found := shutil.which(name))), None)
    if path is None:
        return "not found (only building CUDA kernels needs it: install the CUDA toolkit, or set CUDA_HOME)"
    release = re.search(r"release ([\d.]+)", _output([path, "--version"]))
    return f"{release.group(1) if release else 'unknown version'} at {path}"


def _compiler() -> str:
    name = os.environ.get("CXX", "c++")
    path = shutil.which(name.split()[0]) or shutil.which("g++") or shutil.which("clang++")
    if path is None:
        return "not found (only building from source needs it: install g++ or clang++)"
    first = _output([path, "--version"]).splitlines()
    return f"{first[0] if first else 'unknown version'} at {path}"


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _libraries() -> list[tuple[str, str]]:
    lines = [
        (name, f"loaded from {place}" if there else f"not loaded: {place}")
        for name, there, place in (
            ("_C (CPU kernels)", _library.HAS_CPU_LIBRARY, _library.CPU_LIBRARY),
            ("_C_cuda (CUDA kernels)", _library.HAS_CUDA_LIBRARY, _library.CUDA_LIBRARY),
        )
    ]
    settings = {name: value for name, value in os.environ.items() if name.startswith("MTLKERNELS_")}
    lines += [(name, repr(value)) for name, value in sorted(settings.items())]
    return lines


def _backends() -> list[tuple[str, str]]:
    return [
        (name, "   ".join(f"{device}: {dispatch.backend(name, device):<9}" for device in DEVICES).rstrip())
        for name in sorted(_library.REFERENCES)
    ]


def _processor() -> list[tuple[str, str]]:
    model, found = _cpuinfo()
    used = dispatch.cpu_capability()
    variable = os.environ.get("OMP_NUM_THREADS")
    return [
        ("model", model),
        ("features", " ".join(found) or "unknown (no /proc/cpuinfo)"),
        ("capability in use", used if used else "none: the CPU library is not loaded"),
        (
            "threads",
            f"{torch.get_num_threads()} of {os.cpu_count()} cores" + (f" (OMP_NUM_THREADS={variable})" if variable else ""),
        ),
    ]


def _cpuinfo() -> tuple[str, list[str]]:
    """The processor's name and which of ``FEATURES`` it has."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    name = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.*)$", text, re.MULTILINE)
    have = set(flags.group(1).split()) if flags else set()
    return name.group(1) if name else platform.machine(), [feature for feature in FEATURES if feature in have]
