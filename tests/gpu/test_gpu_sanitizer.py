"""The kernels under compute-sanitizer, where the machine has one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "sanitized.py"
ROOT = PROGRAM.parent.parent.parent


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    # Without torch's caching allocator, which would hide where a tensor ends.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_sanitizer_finds_nothing(gpu, tool):
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("compute-sanitizer is not on the PATH")
    done = run(["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, str(PROGRAM), "cuda"])
    if "not supported" in done.stdout:
        pytest.skip(f"compute-sanitizer cannot run here: {done.stdout[-500:]}")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "all ran" in done.stdout


def test_the_program_that_is_sanitized_runs(device):
    done = run([sys.executable, str(PROGRAM), device.type])
    assert done.returncode == 0, done.stderr[-4000:]
