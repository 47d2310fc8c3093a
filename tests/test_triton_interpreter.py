"""The Triton backend behind the ops: interpreted on the CPU in a process of its own, chosen by name, and missing."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mtlkernels as mtl
from mtlkernels import _library, dispatch
from mtlkernels._optional import MissingPackageError

TESTS = Path(__file__).parent


def version(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.metadata.version(package).split("+")[0].split(".")[:3] if part.isdigit())


def test_interpreted():
    pytest.importorskip("triton")
    if version("triton") < (3, 7, 1) and version("numpy") >= (2, 4):
        pytest.skip("the interpreter of Triton below 3.7.1 does not work with NumPy 2.4")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "0", str(TESTS / "triton_interpret.py")],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(TESTS.parent), *sys.path])},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=540,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def test_without_a_gpu_it_says_so(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.xpu.is_available", lambda: False)
    with (
        pytest.raises(RuntimeError, match="Triton has no GPU to run on here; set TRITON_INTERPRET=1"),
        mtl.use_backend("triton"),
    ):
        pass


def test_missing_triton_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    message = r'use_backend\("triton"\) needs triton, which is not installed; install it with: pip install triton'
    with pytest.raises(MissingPackageError, match=message), mtl.use_backend("triton"):
        pass


CHOICES = """
import sys
if {without}:
    sys.modules["triton"] = None
import torch, mtlkernels
from mtlkernels import dispatch
print(*(dispatch.backend(op, device) for device in ("cuda", "xpu") for op in ("gram", "mix", "cosine")))
"""


@pytest.mark.parametrize(
    ("without", "expected"),
    [(False, "triton triton reference triton triton reference"), (True, "reference " * 6)],
    ids=["with", "without"],
)
def test_automatic_choice_where_the_cuda_library_is_absent(without, expected):
    if not without:
        pytest.importorskip("triton")
    environment = {**os.environ, "MTLKERNELS_DISABLE_C": "1", "PYTHONPATH": str(_library.PACKAGE.parent)}
    code = CHOICES.format(without=without)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == expected.split()


def test_use_backend_reference_serves_every_device():
    with mtl.use_backend("reference"):
        assert {dispatch.backend("gram", device) for device in ("cpu", "cuda", "xpu")} == {"reference"}
