"""benchmarks/step_share.py: its methods take the same step, its clock counts once, its page is complete."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import step_share  # noqa: E402

EXACT = [name for name in step_share.METHODS if name not in (*step_share.SPARING, "sum of losses")]
"""Methods whose weights are those of the gradients of all shared parameters."""


@pytest.mark.parametrize("case", step_share.QUICK)
def test_methods_that_spare_nothing_take_the_same_step(case):
    """float32 throughout; the Gram of 12 tasks has a condition number of thousands."""
    pytest.importorskip("torchjd")
    grads = {}
    for name in EXACT:
        setup = step_share.Setup(step_share.CASES[case], step_share.Clock())
        step_share.METHODS[name](setup)()
        grads[name] = [torch.cat([p.grad.flatten() for p in params]) for params in (setup.shared, setup.heads.parameters())]
    for name in EXACT:
        for actual, value in zip(grads[name], grads["ours"], strict=True):
            assert (actual - value).norm() < 1e-4 * value.norm(), name


def test_the_clock_counts_each_moment_once():
    def busy(seconds: float) -> None:
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass

    clock = step_share.Clock()
    start = time.thread_time()
    with clock.part("rest"):
        busy(0.01)
        clock.timed("Gram", lambda: [busy(0.02), clock.timed("weights", busy)(0.03)])()
        with clock.part("Gram"):
            busy(0.01)
    total = time.thread_time() - start
    for part, seconds in (("rest", 0.01), ("Gram", 0.03), ("weights", 0.03)):
        assert seconds <= clock.seconds[part] < seconds + 0.004
    assert sum(clock.seconds.values()) == pytest.approx(total, abs=0.002)


def test_words_follow_the_numbers():
    rows = {name: step_share.Row(t, 1.0, {}) for name, t in (("ours", 2.0), ("slow", 3.0), ("fast", 1.0), ("same", 2.01))}
    assert (
        step_share.verdict(rows) == "Slower than ours, in its units: slow (1.50). Faster than ours, in its units: fast (0.50)."
    )


def test_committed_page_is_complete():
    """Of the cases that its command names, at least one of each model."""
    page = (ROOT / "docs" / "step_share.md").read_text()
    command = re.search(r"Written by `python -m benchmarks.step_share(?: --cases ([\w ]+))?`;", page)
    assert command is not None
    cases = command[1].split() if command[1] else list(step_share.CASES)
    assert {name.rstrip("248") for name in cases} == {name.rstrip("248") for name in step_share.CASES}
    for name in step_share.METHODS:
        assert page.count(f"| {name} |") == len(cases) + 1
    for name in cases:
        assert f"### {step_share.CASES[name].title}, {step_share.CASES[name].num_tasks} losses" in page
    for option in step_share.OPTIONS:
        assert f"| {option} |" in page


@pytest.mark.slow
def test_quick_mode_writes_the_page(tmp_path):
    pytest.importorskip("torchjd")
    command = [sys.executable, "-m", "benchmarks.step_share", "--quick", "--cases", "mlp", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "step_share.md").read_text()
    assert page in done.stdout
    assert "`python -m benchmarks.step_share --quick --cases mlp`" in page
