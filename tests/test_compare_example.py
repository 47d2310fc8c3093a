"""examples/compare.py: its quick mode, and the numbers of its table."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mtlkernels.weightings import CROSS, ELEMENTWISE, LOSS_ONLY, MEMORY, REGISTRY

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
import compare as example  # noqa: E402

METHODS = ["famo", "upgrad", "m_config", "modo", "graddrop"]
"""One of each kind."""


def test_quick_mode_writes_the_page(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "compare.py"), "--quick", "--data", "digits", "--output", str(tmp_path)]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(
        [*command, "--methods", *METHODS], capture_output=True, text=True, timeout=600, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "compare.md").read_text()
    assert page in done.stdout
    assert "`python examples/compare.py --quick --data digits --methods famo upgrad m_config modo graddrop`" in page
    for method in ("single task", "`mean`", *(f"`{name}`" for name in METHODS)):
        assert f"| {method} |" in page


def test_committed_page_has_every_method():
    page = (ROOT / "docs" / "compare.md").read_text()
    assert "Written by `python examples/compare.py`:" in page
    for method in (*REGISTRY, *LOSS_ONLY, *MEMORY, *CROSS, *ELEMENTWISE):
        assert f"`{method}`" in page
    assert page.count("\n## ") == len(example.PROBLEMS)


def test_table_is_recomputed_by_hand():
    def run(error: float, time: float) -> example.Run:
        return example.Run({"a": error, "b": 2 * error}, 25.0, time)

    runs = {"single": [run(0.1, 4.0), run(0.2, 4.0)], "mean": [run(0.11, 2.0), run(0.22, 1.0)]}
    runs |= {"worse": [run(0.2, 1.0), run(0.4, 1.0)], "better": [run(0.05, 4.0), run(0.1, 2.0)]}
    _, single, mean, better, worse = example.rows_of(runs)
    assert single[0] == "single task"
    assert mean[2] == "10.00 ± 0.00"
    assert better[:3] == ["`better`", "0.1125 ± 0.0530", "-50.00 ± 0.00"]
    assert better[4] == "2.00 ± 0.00"
    assert worse[0] == "`worse`"


@pytest.mark.parametrize("name", example.PROBLEMS)
def test_a_perfect_answer_has_no_error(name):
    problem = example.PROBLEMS[name](0)
    targets = problem.targets[1]
    for target in targets.values():
        output = target.unsqueeze(1) if problem.outputs == 1 else torch.nn.functional.one_hot(target, problem.outputs)
        assert problem.error(output.double(), target) == pytest.approx(0.0, abs=1e-6)
        assert problem.error(-output.double(), target) > 0.3
