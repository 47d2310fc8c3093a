"""benchmarks/memory.py: its modes take the same step, its peaks are in order, its page is complete, and its code runs."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mtlkernels as mtl

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import memory  # noqa: E402
from benchmarks.step_share import Case, Clock, Setup, resnet18  # noqa: E402

EXACT = [name for name, (_, exact) in memory.MODES.items() if exact == "yes"]


class Small(nn.Module):
    """Layers that a trunk is a sequence of."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(12)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


SMALL = Case("small", Small, lambda: torch.randn(8, 64), 64, 8)


def test_exact_modes_take_the_same_step(monkeypatch):
    pytest.importorskip("torchjd")
    monkeypatch.setattr(mtl.PCGrad, "draw_seed", lambda self, device: torch.tensor([5], device=device))
    updates, grams = {}, {}
    for name in EXACT:
        setup = Setup(SMALL, Clock())
        grams[name] = memory.MODES[name][0](setup)()
        updates[name] = torch.cat([p.grad.flatten() for p in setup.shared])
    for name in EXACT:
        assert memory.off(grams[name], grams["stored"]) < 1e-5
        if name != memory.AUTOGRAM:  # which draws orders of its own
            assert (updates[name] - updates["stored"]).norm() < 1e-5 * updates["stored"].norm()


@pytest.mark.parametrize("trunk", [Small, resnet18])
def test_cuts_are_behind_blocks(trunk):
    assert len(memory.cut_at(trunk())) == (12 if trunk is Small else 9)


def test_peaks_are_in_order():
    """Of a trunk with 12 equal layers and eight tasks: half of what stored gradients add, and far less than that."""
    pytest.importorskip("torchjd")
    rows, megabytes = memory.measure(SMALL, 1)
    added = {name: row.peak - 1 for name, row in rows.items()}
    assert added["stored"] > 0.2
    assert added['`rows="bfloat16"`'] < 0.7 * added["stored"]
    for name in ("streamed, `cuts=`", '`rows="online"`'):
        assert added[name] < 0.5 * added["stored"]
    assert rows['`rows="host"`'].host == 8 * sum(p.nbytes for p in Small().parameters())
    assert abs(added["`representation=`"]) < 0.1
    text = memory.page({"transformer8": rows}, [memory.of_case(SMALL, rows, megabytes)], "")
    assert "e-6 of" not in text
    assert "within 1e-06 of the stored one" in text
    assert text.count("| ") > 50


def test_words_follow_the_numbers():
    def rows(peak: float, off: float) -> dict[str, memory.Row]:
        return {name: memory.Row(peak, 0, 1.0, off) for name in memory.MODES}

    good = memory.verdict({"transformer8": rows(1.25, 1e-6)})
    assert "(1.25 at most: met)" in good
    assert "(1e-06 at most: met)" in good
    bad = memory.verdict({"transformer2": rows(1.1, 1e-9), "transformer8": rows(1.26, 2e-6)})
    assert "(1.26 at most: missed)" in bad
    assert "(2e-06 at most: missed)" in bad


def test_code_of_the_page_runs(capsys):
    (block,) = re.findall(r"^```python\n(.*?)^```", memory.CHOOSING, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(block, "docs/memory.md", "exec"), names)
    assert names["choice"].chosen == "bfloat16"
    assert names["optimizer"].rows == "bfloat16"
    assert not names["info"].skipped
    assert "Chosen: bfloat16" in capsys.readouterr().out


def test_committed_page_is_complete_and_meets_its_aim():
    page = (ROOT / "docs" / "memory.md").read_text()
    assert "Written by `python -m benchmarks.memory`;" in page
    assert memory.CHOOSING.rstrip() in page
    for case in memory.CASES.values():
        assert f"### {case.title}, {case.num_tasks} losses" in page
    for name in memory.MODES:
        assert page.partition("## Measured")[2].count(f"| {name} |") == len(memory.CASES)
    assert page.count("at most: met") == 2


@pytest.mark.slow
def test_quick_mode_writes_the_page(tmp_path):
    pytest.importorskip("torchjd")
    command = [sys.executable, "-m", "benchmarks.memory", "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "memory.md").read_text()
    assert page in done.stdout
    assert "`python -m benchmarks.memory --quick`" in page
