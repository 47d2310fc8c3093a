"""The examples of groups run, and print numbers that are recomputed by hand; their pictures show what they are given."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from sklearn.metrics import adjusted_rand_score, average_precision_score

from mtlkernels import plot

ROOT = Path(__file__).parent.parent


def load(path: str) -> ModuleType:
    name = Path(path).stem + "_example"
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load("examples/groups.py")


def test_quick_writes_page_and_picture(tmp_path):
    if importlib.util.find_spec("river") is None:
        pytest.skip("river is not installed")
    command = [sys.executable, "examples/groups.py", "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "groups_yeast.md").read_text()
    assert page in done.stdout
    for method in ("Single task", "Equal weights", "Random groups", "Heterogeneous groups", "Selective groups"):
        assert f"| {method} |" in page
    assert "2 seeds of 30 batches" in page
    assert imread(tmp_path / "groups_yeast.png")[..., :3].std() > 0.1


def test_average_precision_is_scikit_learns(example):
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        score, target = torch.rand(50, generator=generator), (torch.rand(50, generator=generator) > 0.6).float()
        expected = average_precision_score(target.numpy(), score.numpy())
        assert example.average_precision(score, target) == pytest.approx(expected, abs=1e-6)


def test_table_is_recomputed_by_hand(example):
    def run(a: float, b: float, visits: float) -> object:
        return example.Run({"a": a, "b": b}, visits, 2.0)

    runs = {"single": [run(0.5, 0.2, 1), run(0.6, 0.3, 1)], "selective": [run(0.4, 0.3, 2), run(0.6, 0.3, 3)]}
    header, single, selective = example.table(runs, ["a", "b"])
    assert header[0] == "method"
    assert single[1:4] == ["0.4000 ± 0.0707", "-", "1.0 ± 0.0"]
    gains = [100 * (-0.1 / 0.5 + 0.1 / 0.2) / 2, 0.0]
    assert selective[2] == f"{np.mean(gains):.2f} ± {np.std(gains, ddof=1):.2f}"
    assert selective[3] == "2.5 ± 0.7"


def test_bad_arguments(example, capsys):
    for arguments, message in ((["--output", "no/such"], "is not a directory"), (["--seeds", "0"], "are 1 or more")):
        with pytest.raises(SystemExit):
            example.main(arguments)
        assert message in capsys.readouterr().err


def test_planted_clusters_without_noise_are_found(capsys):
    planted = load("examples/planted_groups.py")
    for num_tasks in (6, 12):
        found, expected = planted.run(num_tasks, 0.0, 40, seed=11)
        assert found == expected
        assert len(found) == planted.CLUSTERS[num_tasks]
    assert planted.main(["--quick"]) == 0
    assert capsys.readouterr().out.count("| 6 | 2 |") == len(planted.NOISE)


def test_rand_index_is_scikit_learns():
    planted = load("examples/planted_groups.py")
    rng = np.random.default_rng(0)
    for _ in range(10):
        labels = rng.integers(0, 3, size=(2, 12))
        first, second = ([np.flatnonzero(row == v).tolist() for v in set(row.tolist())] for row in labels)
        assert planted.rand_index(first, second) == pytest.approx(adjusted_rand_score(*labels))


def test_the_code_of_the_page_runs(capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/groups.md").read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {}
    for block, expected in zip(blocks, ("tensor", "[[0, 1], [2, 3]]"), strict=True):
        exec(compile(block, "docs/groups.md", "exec"), names)
        assert expected in capsys.readouterr().out


# --- pictures -------------------------------------------------------------------------------------------------------------

TASKS = ("a", "b", "c", "d")
GROUPS = [[0, 2], [1, 3]]


def test_affinity_matrix_is_in_the_order_of_the_groups():
    values = np.random.default_rng(0).normal(size=(4, 4))
    axes, _ = plot.affinity_matrix(values, TASKS, GROUPS).axes
    (image,) = axes.get_images()
    order = [0, 2, 1, 3]
    np.testing.assert_array_equal(image.get_array(), values[np.ix_(order, order)])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "c", "b", "d"]
    assert image.get_clim()[1] == np.abs(values[~np.eye(4, dtype=bool)]).max() == -image.get_clim()[0]
    assert [(frame.get_x(), frame.get_width()) for frame in axes.patches] == [(-0.5, 2), (1.5, 2)]
    plot.affinity_matrix([[1.0]], "a")


def test_group_graph_joins_the_most_similar_pairs():
    similarity = np.array([[1, 0.1, 0.9, 0.2], [0.1, 1, 0.0, 0.8], [0.9, 0.0, 1, 0.1], [0.2, 0.8, 0.1, 1]])
    (axes,) = plot.group_graph(similarity, TASKS, GROUPS).axes
    assert len(axes.get_lines()) == 2
    strong, weak = sorted(axes.get_lines(), key=lambda line: -line.get_linewidth())
    places = {text.get_text(): np.array(text.get_position()) / 1.13 for text in axes.texts}
    np.testing.assert_allclose(strong.get_xydata(), [places["a"], places["c"]], atol=1e-12)
    np.testing.assert_allclose(weak.get_xydata(), [places["b"], places["d"]], atol=1e-12)
    assert [len(points.get_offsets()) for points in axes.collections] == [2, 2]


def test_groups_over_time_shows_each_groups_first_task():
    (axes,) = plot.groups_over_time([[[0], [1], [2], [3]], GROUPS, [[0, 1, 2, 3]]], TASKS).axes
    (image,) = axes.get_images()
    assert image.get_array().tolist() == [[0, 0, 0], [1, 1, 0], [2, 0, 0], [3, 1, 0]]


def test_pictures_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match=r"matrix has shape \(2, 2\); 4 tasks take \[4, 4\]"):
        plot.affinity_matrix(np.eye(2), TASKS)
    for call in (
        lambda: plot.affinity_matrix(np.eye(4), TASKS, [[0, 1]]),
        lambda: plot.group_graph(np.eye(4), TASKS, [[0, 1], [1, 2, 3]]),
        lambda: plot.groups_over_time([GROUPS, [[0]]], TASKS),
    ):
        with pytest.raises(ValueError, match="put each of the 4 tasks into exactly one"):
            call()
