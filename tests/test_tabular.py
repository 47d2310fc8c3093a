"""Yeast and QM9 against the files they come from."""

import gzip
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from mtlkernels import tabular
from mtlkernels._optional import MissingPackageError
from mtlkernels.tabular import QM9_TASKS, YEAST_TASKS, batches, load_qm9, load_yeast


def package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{name} is not installed")
    return Path(spec.submodule_search_locations[0])


def test_yeast():
    path = package("river") / "datasets/yeast.csv.gz"
    with gzip.open(path, "rt") as lines:
        source = np.loadtxt(lines, delimiter=",", skiprows=1)
    train, test = load_yeast()
    assert (len(train), len(test)) == (1933, 484)
    assert train.inputs.shape == (1933, 103)
    assert tuple(train.targets) == YEAST_TASKS
    torch.testing.assert_close(train.inputs.mean(0), torch.zeros(103), atol=1e-5, rtol=0)
    torch.testing.assert_close(train.inputs.std(0), torch.ones(103), atol=1e-5, rtol=0)
    labels = torch.stack([torch.cat([train.targets[task], test.targets[task]]) for task in YEAST_TASKS], 1).numpy()
    assert set(np.unique(labels)) == {0, 1}
    # The rows of both parts are the rows of the file, each once.
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(1)).numpy()
    np.testing.assert_array_equal(labels, source[order, 103:])
    raw = source[order, :103]
    scaled = (raw - raw[:1933].mean(0)) / raw[:1933].std(0, ddof=1)
    np.testing.assert_allclose(torch.cat([train.inputs, test.inputs]).numpy(), scaled, rtol=1e-3, atol=1e-3)
    assert not torch.equal(load_yeast(seed=1)[0].inputs, train.inputs)
    assert torch.equal(load_yeast()[0].inputs, train.inputs)


def test_qm9_of_a_small_file(tmp_path, monkeypatch):
    """The package's format, with the two molecules known from it and one exponent written as it writes five."""
    columns = ["Index", "Elements", "XYZ_Ang", *QM9_TASKS.values()]
    water = "['O','H','H']", "[[0,0,0],[0,0,1],[1,0,0]]"
    methane = "['C','H','H','H','H']", "[[0,0,0],[1,0,0],[0,1,0],[0,0,1],[-1,0,0]]"
    rows = []
    for n in range(10):
        values = [str(n + k / 10) for k in range(12)]
        values[0] = f"{n}.5*^-3"
        rows.append(",".join([str(n), *(f'"{text}"' for text in (water, methane)[n % 2]), *values]))
    (tmp_path / "data").mkdir()
    for part, chosen in ((1, rows[:4]), (2, rows[4:7]), (3, rows[7:])):
        (tmp_path / f"data/qm9_part{part}.csv").write_text("\n".join([",".join(columns), *chosen]) + "\n")
    monkeypatch.setattr(tabular, "package_file", lambda package, file, purpose: tmp_path / file)
    train, test = load_qm9()
    assert (len(train), len(test)) == (8, 2)
    assert tuple(train.targets) == tuple(QM9_TASKS)
    assert train.inputs.shape == (8, 34)
    for values in train.targets.values():
        assert float(values.mean()) == pytest.approx(0, abs=1e-5)
        assert float(values.std()) == pytest.approx(1, abs=1e-5)
    everything = torch.cat([train.targets["mu"], test.targets["mu"]]).sort().values
    torch.testing.assert_close(everything.diff(), everything.diff()[:1].expand(9), atol=1e-4, rtol=0)  # 0.5e-3, 1.5e-3, ...
    assert len(load_qm9(6)[0]) == 4
    with pytest.raises(ValueError, match="num_molecules is 3"):
        load_qm9(3)
    (tmp_path / "data/qm9_part1.csv").write_text("Index\n1\n")
    with pytest.raises(ValueError, match=r"qm9_part1.csv lacks the column 'Elements'"):
        load_qm9()


def test_a_molecule_is_its_coulomb_matrix_and_its_elements():
    vector = tabular._molecule("['O','H','H']", "[[0,0,0],[0,0,1],[0,2,0]]")
    matrix = [[0.5 * 8**2.4, 8, 4], [8, 0.5, 5**-0.5], [4, 5**-0.5, 0.5]]
    expected = sorted(np.linalg.eigvalsh(matrix), key=abs, reverse=True)
    np.testing.assert_allclose(vector[:3], expected, rtol=1e-6)
    assert vector[3:].tolist() == [0] * 26 + [0, 2, 0, 1, 0]


def test_files_that_are_not_there(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for load, name in ((load_yeast, "river"), (load_qm9, "qm9pack")):
        with pytest.raises(MissingPackageError, match=f"needs {name}, which is not installed.*pip install {name}"):
            load()
    monkeypatch.undo()
    monkeypatch.setattr(tabular, "package_file", lambda *_: tmp_path / "yeast.csv.gz")
    with gzip.open(tmp_path / "yeast.csv.gz", "wt") as lines:
        lines.write("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"starts with the columns \['a', 'b'\]"):
        load_yeast()


def test_batches():
    first, again, other = (torch.stack(list(batches(100, 8, 5, seed))) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (5, 8)
    assert first.max() < 100
