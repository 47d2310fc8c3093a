"""Real many-task tables that come inside packages of the index; nothing is downloaded.

The files are found without importing the packages, which need others to be imported.
"""

import csv
import gzip
import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ._optional import MissingPackageError

YEAST_TASKS = tuple(f"class {i}" for i in range(1, 15))
QM9_TASKS = {
    "mu": "Dipole_debye",
    "alpha": "Polarizability_bohr3",
    "homo": "HOMO_au",
    "lumo": "LUMO_au",
    "gap": "HOMO_LUMO_gap_au",
    "r2": "R2_bohr2",
    "zpve": "ZPVE_au",
    "u0": "InternalEnergy_0K_au",
    "u298": "InternalEnergy_298K_au",
    "h298": "Enthalphy_298K_au",
    "g298": "GibbsFreeEnergy_298K_au",
    "cv": "Heatcapacity_Cv_cal_mol_K",
}
"""Task -> its column in the package's files."""
ELEMENTS = "CHNOF"
NEIGHBOURS = 29
"""Atoms of the largest QM9 molecule."""


@dataclass(frozen=True)
class Table:
    """Rows with the same features for every task."""

    inputs: Tensor
    """float32 [N, F]; mean 0 and standard deviation 1 over the training rows."""
    targets: dict[str, Tensor]
    """Task -> float32 [N]: 0 or 1 for classes, mean 0 and standard deviation 1 over the training rows for numbers."""

    def __len__(self) -> int:
        return len(self.inputs)


def load_yeast(seed: int = 0) -> tuple[Table, Table]:
    """Yeast (Elisseeff and Weston 2001): 2,417 genes, 103 numbers each, 14 functional classes, which are 14 binary tasks.

    From ``datasets/yeast.csv.gz`` of the package river.

    Args:
        seed: of the split into 1,933 training and 484 test rows.

    Raises:
        MissingPackageError: river is not installed.
        ValueError: its file has other columns.
    """
    path = package_file("river", "datasets/yeast.csv.gz", "mtlkernels.tabular.load_yeast")
    with gzip.open(path, "rt") as lines:
        names, *rows = csv.reader(lines)
    expected = [*(f"Att{i}" for i in range(1, 104)), *(f"Class{i}" for i in range(1, 15))]
    if names != expected:
        raise ValueError(
            f"{path} starts with the columns {names[:3]}; this loader reads river's Att1 to Att103, Class1 to Class14."
        )
    values = torch.tensor([[float(value) for value in row] for row in rows])
    return _split(values[:, :103], dict(zip(YEAST_TASKS, values[:, 103:].T, strict=True)), seed, scale_targets=False)


def load_qm9(num_molecules: int | None = None, seed: int = 0) -> tuple[Table, Table]:
    """QM9 (Ramakrishnan et al. 2014): 12 properties of small molecules, which are 12 regression tasks.

    From ``data/qm9_part*.csv`` of the package qm9pack. The features of a molecule are the eigenvalues of its Coulomb matrix
    (Rupp et al. 2012), by magnitude, and its numbers of atoms of each element; 34 numbers.

    Args:
        num_molecules: the first so many molecules of a random order; None: all 130,831.
        seed: of that order and of the split, four in five for training.

    Raises:
        MissingPackageError: qm9pack is not installed.
        ValueError: fewer than 5 molecules.
    """
    if num_molecules is not None and num_molecules < 5:
        raise ValueError(f"num_molecules is {num_molecules}; pass 5 or more, or None for all.")
    paths = [package_file("qm9pack", f"data/qm9_part{n}.csv", "mtlkernels.tabular.load_qm9") for n in (1, 2, 3)]
    rows = [row for path in paths for row in read_columns(path, ("Elements", "XYZ_Ang", *QM9_TASKS.values()))]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:num_molecules].tolist()
    chosen = [rows[n] for n in order]
    inputs = torch.from_numpy(np.stack([_molecule(elements, positions) for elements, positions, *_ in chosen]))
    targets = torch.tensor([[float(value) for value in row[2:]] for row in chosen])
    return _split(inputs, dict(zip(QM9_TASKS, targets.T, strict=True)), seed, scale_targets=True)


def package_file(package: str, file: str, purpose: str) -> Path:
    """A data file of a package, which need not be importable.

    Args:
        package: the name of its module, and to install it by.
        file: the path inside it.
        purpose: what needs it, the subject of the error message.

    Raises:
        MissingPackageError: the package is not installed.
        ValueError: it has no such file.
    """
    spec = importlib.util.find_spec(package)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    if not folders:
        raise MissingPackageError(
            f"{purpose} needs {package}, which is not installed; install it with: pip install {package}", name=package
        )
    path = Path(folders[0]) / file
    if not path.exists():
        raise ValueError(f"{path} is not there; this loader needs a version of {package} that ships it.")
    return path


def read_columns(path: Path, columns: Sequence[str]) -> Iterator[list[str]]:
    """The named columns of each row of a file of comma-separated values.

    Raises:
        ValueError: the file has no such column.
    """
    with path.open(newline="") as lines:
        reader = csv.reader(lines)
        header = next(reader)
        missing = [column for column in columns if column not in header]
        if missing:
            raise ValueError(f"{path} lacks the column {missing[0]!r}.")
        places = [header.index(column) for column in columns]
        for row in reader:
            yield [row[place].replace("*^", "e") for place in places]  # five molecules have exponents like this


def _molecule(elements: str, positions: str) -> "np.ndarray[tuple[int], np.dtype[np.float32]]":
    """Eigenvalues of the Coulomb matrix: Z_i Z_j / |r_i - r_j|, 0.5 Z_i^2.4 on the diagonal; and the counts of elements."""
    symbols = [symbol.strip(" '\"") for symbol in elements.strip("[]").split(",")]
    charges = np.array([{"C": 6, "H": 1, "N": 7, "O": 8, "F": 9}[symbol] for symbol in symbols], dtype=np.float64)
    places = np.array([float(value) for value in positions.replace("[", " ").replace("]", " ").replace(",", " ").split()])
    places = places.reshape(-1, 3)
    distance = np.linalg.norm(places[:, None] - places[None], axis=-1)
    np.fill_diagonal(distance, 1.0)
    matrix = np.outer(charges, charges) / distance
    np.fill_diagonal(matrix, 0.5 * charges**2.4)
    eigenvalues = np.linalg.eigvalsh(matrix)
    eigenvalues = eigenvalues[np.argsort(-np.abs(eigenvalues), kind="stable")]
    padded = np.zeros(NEIGHBOURS, dtype=np.float32)
    padded[: len(eigenvalues)] = eigenvalues
    counts = [symbols.count(element) for element in ELEMENTS]
    return np.concatenate([padded, np.array(counts, dtype=np.float32)])


def _split(inputs: Tensor, targets: dict[str, Tensor], seed: int, scale_targets: bool) -> tuple[Table, Table]:
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed + 1))
    train, test = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :]
    inputs = _standardised(inputs, train)
    if scale_targets:
        targets = {task: _standardised(values, train) for task, values in targets.items()}
    return tuple(  # type: ignore[return-value]
        Table(inputs[rows], {task: values[rows] for task, values in targets.items()}) for rows in (train, test)
    )


def _standardised(values: Tensor, train: Tensor) -> Tensor:
    mean, deviation = values[train].mean(0), values[train].std(0)
    return (values - mean) / torch.where(deviation > 0, deviation, 1.0)


def batches(rows: int, size: int, steps: int, seed: int) -> Iterable[Tensor]:
    """Indices of ``steps`` random batches; the same for equal arguments."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield torch.randint(rows, (size,), generator=generator)
