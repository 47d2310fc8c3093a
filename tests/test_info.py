"""``python -m mtlkernels info`` with and without the library, compilers and optional packages."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mtlkernels import _library, dispatch, info
from mtlkernels.__main__ import main


def run_info(code: str = "", **environment: str) -> str:
    """What a fresh process prints, after ``code`` ran in it."""
    program = f"{code}\nfrom mtlkernels.__main__ import main\nraise SystemExit(main(['info']))"
    variables = {**os.environ, "PYTHONPATH": str(_library.PACKAGE.parent), **environment}
    done = subprocess.run(
        [sys.executable, "-c", program], env=variables, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def line(text: str, name: str) -> str:
    """The value printed after ``name``."""
    (found,) = [row for row in text.splitlines() if row.startswith(f"  {name}  ")]
    return found.removeprefix(f"  {name}").strip()


def test_versions_and_backends_are_those_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out

    assert line(text, "torch").startswith(f"{torch.__version__}, built for ")
    assert line(text, "rich") == importlib.metadata.version("rich")
    assert line(text, "threads").startswith(f"{torch.get_num_threads()} of {os.cpu_count()} cores")
    for op in _library.REFERENCES:
        assert line(text, op).split() == ["cpu:", dispatch.backend(op, "cpu"), "cuda:", dispatch.backend(op, "cuda")]


def test_with_the_library(cpu_library: str) -> None:
    text = run_info(MTLKERNELS_DISABLE_C="0")

    assert line(text, "_C (CPU kernels)") == f"loaded from {cpu_library}"
    assert line(text, "gram").startswith("cpu: cpp ")
    assert line(text, "capability in use") in dispatch.CAPABILITIES


def test_without_the_library() -> None:
    text = run_info(MTLKERNELS_DISABLE_C="1")

    assert line(text, "_C (CPU kernels)") == "not loaded: switched off by the environment variable MTLKERNELS_DISABLE_C"
    on_gpus = "triton" if info.installed("triton") else "reference"
    assert line(text, "gram").split() == ["cpu:", "reference", "cuda:", on_gpus]
    assert line(text, "capability in use") == "none: the CPU library is not loaded"
    assert line(text, "MTLKERNELS_DISABLE_C") == "'1'"


def test_why_a_library_was_not_built(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(_library, "HAS_CPU_LIBRARY", False)
    monkeypatch.setattr(_library, "CPU_LIBRARY", "not built: there was no C++ compiler")
    main(["info"])

    assert line(capsys.readouterr().out, "_C (CPU kernels)") == "not loaded: not built: there was no C++ compiler"


def test_without_compilers(tmp_path: Path) -> None:
    text = run_info(PATH=str(tmp_path), CXX="c++", CUDA_HOME=str(tmp_path))

    if not Path("/usr/local/cuda/bin/nvcc").exists():  # where the build looks, whatever the PATH
        assert line(text, "nvcc").startswith("not found (")
    assert line(text, "C++ compiler").startswith("not found (")


def test_a_compiler_is_found_by_its_variable(tmp_path: Path) -> None:
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 98.7, V98.7.65'\n")
    compiler.chmod(0o755)

    assert line(run_info(CUDA_HOME=str(tmp_path), PATH="/bin"), "nvcc") == f"98.7 at {compiler}"


def test_without_optional_packages() -> None:
    text = run_info(
        """
import importlib.metadata, sys
absent = {"rich": "rich", "matplotlib": "matplotlib", "sklearn": "scikit-learn"}
sys.modules.update(dict.fromkeys(absent))
version = importlib.metadata.version
def without(package):
    if package in absent.values():
        raise importlib.metadata.PackageNotFoundError(package)
    return version(package)
importlib.metadata.version = without
"""
    )

    for package in ("scikit-learn", "matplotlib", "rich"):
        assert line(text, package).startswith("not installed (")
        assert f"pip install {package}" in line(text, package)


def test_installed() -> None:
    assert info.installed("torch") == importlib.metadata.version("torch")
    assert info.installed("a-package-that-is-not-there") is None


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["no_such_command"])

    assert caught.value.code == 2
    assert "invalid choice" in capsys.readouterr().err
