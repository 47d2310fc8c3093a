"""Whole training steps: what K backward passes cost, where the time goes, what the options that spare them cost and change.

A convnet, ResNet-18, a transformer of 7M parameters with 2, 4 and 8 losses, an MLP with 12, on random data: each method trains
a copy of its own, all interleaved in one run, one thread, in units of the plain step (the sum of the losses) of the same round.
All weights are IMTL-G's. Then MultiDigits, as in ``examples/compare.py``, with each option: what it does to the result.

    python -m benchmarks.step_share            minutes: docs/step_share.md
    python -m benchmarks.step_share --quick    a look at the small models, not a result
"""

import argparse
import itertools
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import mtlkernels as mtl

from .race import peak_bytes

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
from compare import BATCH, LEARNING_RATE, Problem, multi_digits, table  # noqa: E402  the script beside the package

from mtlkernels.demo import spread  # noqa: E402

WEIGHTING = "imtl_g"
EVERY = 4
FRACTION = 4
"""The sub-batch is one row of so many."""
PARTS = ("forward", "backward", "Gram", "weights", "combine", "optimizer", "rest")


# --- models --------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """ResNet's basic block (He et al. 2016, figure 2)."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.second, self.second_norm = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        same = stride == 1 and width == out
        self.shortcut = (
            nn.Identity() if same else nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        )

    def forward(self, x: Tensor) -> Tensor:
        inner = self.first_norm(self.first(x)).relu()
        return (self.second_norm(self.second(inner)) + self.shortcut(x)).relu()


def resnet18() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    for width, out, stride in ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)):
        layers += [Block(width, out, stride), Block(out, out, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2592, 64),
        nn.ReLU(),
    )


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(103, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())


class Transformer(nn.Module):
    """Eight pre-norm layers of width 256 over 128 tokens of a vocabulary of 2048."""

    def __init__(self, width: int = 256, tokens: int = 128) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(2048, width), nn.Embedding(tokens, width)
        self.places = torch.arange(tokens)
        layer = partial(nn.TransformerEncoderLayer, activation="gelu", batch_first=True, norm_first=True, dropout=0.0)
        self.layers = nn.Sequential(*(layer(width, 4, 4 * width) for _ in range(8)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.embed(x) + self.place(self.places))


@dataclass(frozen=True)
class Case:
    """A trunk, its inputs and the number of losses."""

    title: str
    trunk: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    width: int
    num_tasks: int


def _tokens() -> Tensor:
    return torch.randint(2048, (8, 128))


CASES = {
    "convnet": Case("convnet, 256 pictures of 36 x 36", convnet, lambda: torch.randn(256, 1, 36, 36), 64, 2),
    "mlp": Case("MLP 103-128-128, 128 rows", mlp, lambda: torch.randn(128, 103), 128, 12),
    "resnet": Case("ResNet-18, 16 pictures of 64 x 64", resnet18, lambda: torch.randn(16, 3, 64, 64), 512, 3),
    "transformer2": Case("transformer, 8 x 128 tokens", Transformer, _tokens, 256, 2),
    "transformer4": Case("transformer, 8 x 128 tokens", Transformer, _tokens, 256, 4),
    "transformer8": Case("transformer, 8 x 128 tokens", Transformer, _tokens, 256, 8),
}
QUICK = ("convnet", "mlp")


# --- the clock -----------------------------------------------------------------------------------------------------------


class Clock:
    """Thread seconds spent in each part, without what the parts inside it take; other processes do not count."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._parts: list[str] = []
        self._since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._switch(lambda: self._parts.append(name))
        try:
            yield
        finally:
            self._switch(self._parts.pop)

    def _switch(self, change: Callable[[], Any]) -> None:
        now = time.thread_time()
        if self._parts:
            self.seconds[self._parts[-1]] += now - self._since
        change()
        self._since = time.thread_time()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return run


# --- methods -------------------------------------------------------------------------------------------------------------


class Setup:
    """A model of a case with its inner optimizer; every method has its own."""

    def __init__(self, case: Case, clock: Clock) -> None:
        torch.manual_seed(0)
        self.case, self.clock = case, clock
        self.trunk, self.x = case.trunk(), case.inputs()
        self.heads = nn.ModuleList(nn.Linear(case.width, 4) for _ in range(case.num_tasks))
        with torch.no_grad():
            shape = self.heads[0](self.trunk(self.x)).shape
        self.targets = [torch.randn(shape) for _ in range(case.num_tasks)]
        self.shared = list(self.trunk.parameters())
        self.inner = torch.optim.AdamW([*self.shared, *self.heads.parameters()], 1e-4, fused=True)
        self.inner.step = clock.timed("optimizer", self.inner.step)  # type: ignore[method-assign]

    def losses(self, rows: slice = slice(None)) -> tuple[list[Tensor], Tensor]:
        with self.clock.part("forward"):
            z = self.trunk(self.x[rows])
            pairs = zip(self.heads, self.targets, strict=True)
            return [(head(z) - target[rows]).square().mean() for head, target in pairs], z

    def optimizer(self, **options: Any) -> mtl.MultiTaskOptimizer:
        weighting = mtl.get_weighting(WEIGHTING)
        weighting.forward = self.clock.timed("weights", weighting.forward)  # type: ignore[method-assign]
        heads = {k: head.parameters() for k, head in enumerate(self.heads)}
        return mtl.MultiTaskOptimizer(self.inner, weighting, shared=self.shared, heads=heads, **options)

    def part_of(self, number: int, parts: int) -> slice:
        size = len(self.x) // parts
        return slice(number * size, (number + 1) * size)

    def fill(self, update: Sequence[Tensor], losses: Sequence[Tensor]) -> None:
        """``.grad`` of the shared parameters, and of each head its own loss's gradient."""
        for param, grad in zip(self.shared, update, strict=True):
            param.grad = grad
        for head, loss in zip(self.heads, losses, strict=True):
            params = list(head.parameters())
            for param, grad in zip(params, torch.autograd.grad(loss, params, retain_graph=True), strict=True):
                param.grad = grad


Step = Callable[[], object]


def plain(setup: Setup) -> Step:
    def step() -> None:
        losses, _ = setup.losses()
        setup.inner.zero_grad()
        with setup.clock.part("backward"):
            torch.stack(losses).sum().backward()
        setup.inner.step()

    return step


def ours(setup: Setup, **options: Any) -> Step:
    optimizer = setup.optimizer(**options)
    return lambda: optimizer.step(setup.losses()[0])


def at_representation(setup: Setup) -> Step:
    optimizer = setup.optimizer()

    def step() -> None:
        losses, z = setup.losses()
        optimizer.step(losses, representation=z)

    return step


def of_sub_batch(setup: Setup, halves: bool) -> Step:
    optimizer = setup.optimizer()
    places = [setup.part_of(n, 2 * FRACTION) for n in range(2)] if halves else [setup.part_of(0, FRACTION)]

    def step() -> None:
        parts = [setup.losses(rows)[0] for rows in places]
        optimizer.step(setup.losses()[0], gram_losses=parts if halves else parts[0])

    return step


def batched(setup: Setup) -> Step:
    """One vectorised backward pass for all tasks (``is_grads_batched``), then our ops."""
    weighting = mtl.get_weighting(WEIGHTING)
    count = setup.case.num_tasks

    def step() -> None:
        losses, _ = setup.losses()
        jacobian = torch.autograd.grad(torch.stack(losses), setup.shared, torch.eye(count), True, is_grads_batched=True)
        rows = [[rows[k] for rows in jacobian] for k in range(count)]
        with setup.clock.part("weights"):
            weights = weighting(mtl.ops.gram(rows))
        setup.fill(mtl.ops.combine(rows, weights), losses)
        setup.inner.step()

    return step


def torchjd(setup: Setup, flag: bool) -> Step:
    from torchjd.aggregation import IMTLG
    from torchjd.autojac import jac_to_grad, mtl_backward

    aggregator, heads = IMTLG(), [list(head.parameters()) for head in setup.heads]

    def step() -> None:
        losses, z = setup.losses()
        setup.inner.zero_grad()
        with setup.clock.part("backward"):
            mtl_backward(losses, z, tasks_params=heads, shared_params=setup.shared)
        with setup.clock.part("combine"):
            jac_to_grad(setup.shared, aggregator, optimize_gramian_computation=flag)
        setup.inner.step()

    return step


def autogram(setup: Setup, method: str = "IMTLGWeighting") -> Callable[[], Tensor]:
    """The step returns the Gram."""
    from torchjd import aggregation
    from torchjd.autogram import Engine

    engine, weighting = Engine(setup.trunk, batch_dim=None), getattr(aggregation, method)()

    def step() -> Tensor:
        losses, _ = setup.losses()
        stacked = torch.stack(losses)
        with setup.clock.part("Gram"):
            gram: Tensor = engine.compute_gramian(stacked)
        with setup.clock.part("weights"):
            weights = weighting(gram)
        update = torch.autograd.grad(stacked, setup.shared, weights, retain_graph=True)
        setup.fill(update, losses)
        setup.inner.step()
        return gram

    return step


def compiled(setup: Setup) -> Step:
    def combination(rows: list[list[Tensor]]) -> Tensor:
        flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
        gram = flat @ flat.mT
        weights = torch.linalg.pinv(gram) @ gram.diagonal().sqrt()
        return weights / weights.sum() @ flat

    function, sizes = torch.compile(combination, dynamic=False), [p.numel() for p in setup.shared]

    def step() -> None:
        losses, _ = setup.losses()
        rows = [list(torch.autograd.grad(loss, setup.shared, retain_graph=True)) for loss in losses]
        with setup.clock.part("combine"):
            update = function(rows).split(sizes)
        setup.fill([u.view_as(p) for u, p in zip(update, setup.shared, strict=True)], losses)
        setup.inner.step()

    return step


METHODS: dict[str, Callable[[Setup], Step]] = {
    "sum of losses": plain,
    "ours": ours,
    f"ours, `update_every={EVERY}`": partial(ours, update_every=EVERY),
    "ours, `representation=`": at_representation,
    f"ours, `gram_losses=` of 1/{FRACTION}": partial(of_sub_batch, halves=False),
    "the same of two halves": partial(of_sub_batch, halves=True),
    "ours, batched backward pass": batched,
    "PyTorch, compiled": compiled,
    "TorchJD": partial(torchjd, flag=False),
    "TorchJD, flag": partial(torchjd, flag=True),
    "TorchJD, autogram": autogram,
}
SPARING = list(METHODS)[2:6]
"""What spares backward passes through the trunk."""


# --- measuring -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One method: medians over the rounds, in units of the plain step."""

    time: float
    memory: float
    parts: dict[str, float]


def measure(case: Case, seconds: float) -> tuple[dict[str, Row], float, float]:
    """Rows of all methods; milliseconds and MB of the plain step."""
    clock = Clock()
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
    with ExitStack() as stack:
        for name, owner, attribute in (
            ("backward", torch.autograd, "grad"),
            ("Gram", mtl.ops, "gram"),
            ("combine", mtl.ops, "combine"),
            ("combine", mtl.ops, "combine_rows"),
        ):
            timed = clock.timed(name, getattr(owner, attribute))
            stack.enter_context(mock.patch.object(owner, attribute, timed))
        setups = {name: Setup(case, clock) for name in METHODS}
        steps = {name: method(setups[name]) for name, method in METHODS.items()}
        cycle = {name: EVERY if "update_every" in name else 1 for name in METHODS}
        for name, step in steps.items():
            for _ in range(cycle[name]):  # state is allocated, functions are compiled
                step()
        end = time.thread_time() + seconds
        while len(rounds["ours"]) < 3 or time.thread_time() < end:
            for name, step in steps.items():
                clock.seconds.clear()
                for _ in range(cycle[name]):
                    with clock.part("rest"):
                        step()
                rounds[name].append({part: clock.seconds[part] / cycle[name] for part in PARTS})
        peaks = {name: peak_bytes(step) for name, step in steps.items()}
    base = [sum(parts.values()) for parts in rounds["sum of losses"]]
    rows = {}
    for name, done in rounds.items():
        total = statistics.median(sum(parts.values()) / b for parts, b in zip(done, base, strict=True))
        share = {part: statistics.median(parts[part] / b for parts, b in zip(done, base, strict=True)) for part in PARTS}
        rows[name] = Row(total, peaks[name] / peaks["sum of losses"], share)
    return rows, 1e3 * statistics.median(base), peaks["sum of losses"] / 1e6


# --- the effect on the result ---------------------------------------------------------------------------------------------

OPTIONS = (
    "none",
    f"`update_every={EVERY}`",
    "`update_every=16`",
    "`representation=`",
    "`gram_losses=`, 32 rows",
    "two halves of them",
)
WEIGHTINGS = ("imtl_g", "mgda", "upgrad")
PROBE = 10


@dataclass(frozen=True)
class Trained:
    """One training run."""

    error: float
    """Mean test error of the tasks."""
    off: float
    """Mean over probed steps of sum_k |w_k - those of the whole Gram| / sum_k |the latter|."""
    spread: tuple[float, float, float]
    """Mean squares over probed steps, over the squared norm of the Gram: of ``gram_error``, of ``gram_bias``, and of the
    difference from the whole batch's Gram; NaN without halves."""


def train(problem: Problem, option: str, weighting: str, steps: int, seed: int) -> Trained:
    net = problem.net(problem.tasks, seed)
    every = int(option.split("=")[1].strip("`")) if "update_every" in option else 1
    inner = torch.optim.Adam(net.parameters(), LEARNING_RATE)
    optimizer = mtl.MultiTaskOptimizer(inner, weighting, shared=net.trunk.parameters(), tasks=problem.tasks, update_every=every)
    exact, trunk = mtl.get_weighting(weighting), list(net.trunk.parameters())
    off, squares = [], []
    for step, (inputs, targets) in enumerate(problem.batches(steps, seed)):
        features = net.trunk(inputs)
        losses = {task: problem.loss(head(features), targets[task]) for task, head in net.heads.items()}
        more: dict[str, Any] = {}
        size = BATCH // FRACTION
        if "representation" in option:
            more = {"representation": features}
        elif "gram_losses" in option or "halves" in option:
            ends = [0, size] if "gram_losses" in option else [0, size // 2, size]
            parts = [slice(a, b) for a, b in itertools.pairwise(ends)]
            sub = [
                problem.losses(net, inputs[part], {task: target[part] for task, target in targets.items()}) for part in parts
            ]
            more = {"gram_losses": sub if len(sub) > 1 else sub[0]}
        gram = None
        if step % PROBE == PROBE // 2:
            grads = [torch.autograd.grad(loss, trunk, retain_graph=True) for loss in losses.values()]
            gram = mtl.gram(grads)
        info = optimizer.step(losses, **more)
        if isinstance(gram, Tensor):
            weights = exact(gram)
            off.append(float((info.weights - weights).abs().sum() / weights.abs().sum()))
            if info.gram is not None and info.gram_error is not None and info.gram_bias is not None:
                differences = torch.stack([info.gram_error, info.gram_bias, info.gram - gram])
                squares.append((differences.flatten(1).norm(dim=1) / info.gram.norm()).square())
    error = statistics.mean(problem.errors(net).values())
    mean = torch.stack(squares).mean(0) if squares else torch.full((3,), torch.nan)
    return Trained(error, statistics.mean(off), tuple(mean.tolist()))  # type: ignore[arg-type]


def effects(steps: int, seeds: int) -> dict[tuple[str, str], list[Trained]]:
    """Every option with every weighting, and the mean, from the same initial weights on the same batches."""
    problems = [multi_digits(seed) for seed in range(seeds)]
    pairs = [("none", "mean"), *itertools.product(OPTIONS, WEIGHTINGS)]
    return {pair: [train(problem, *pair, steps, seed) for seed, problem in enumerate(problems)] for pair in pairs}


# --- the page ------------------------------------------------------------------------------------------------------------


def of_case(case: Case, rows: dict[str, Row], ms: float, megabytes: float) -> str:
    cells = [
        [
            name,
            f"{row.time:.2f}",
            f"{row.memory:.2f}",
            *(f"{row.parts[part]:.3f}" if row.parts[part] else "-" for part in PARTS),
        ]
        for name, row in rows.items()
    ]
    head = ["method", "time", "peak memory", *PARTS]
    title = f"### {case.title}, {case.num_tasks} losses\n\nThe plain step: {ms:.2f} ms, {megabytes:.2f} MB."
    return f"{title}\n\n{table([head, *cells])}\n\n{verdict(rows)}"


def verdict(rows: dict[str, Row]) -> str:
    """Which lines are slower than ours and which are faster, in words."""
    base = rows["ours"].time
    lines = []
    for word, kept in (("Slower", lambda t: t > 1.02 * base), ("Faster", lambda t: t < base / 1.02)):
        named = [f"{name} ({row.time / base:.2f})" for name, row in rows.items() if name != "ours" and kept(row.time)]
        lines.append(f"{word} than ours, in its units: {', '.join(named) or 'nothing'}.")
    return " ".join(lines)


def of_effects(done: dict[tuple[str, str], list[Trained]]) -> str:
    cells = []
    for option in OPTIONS:
        row = [option]
        for weighting in WEIGHTINGS:
            runs = done[option, weighting]
            row += [spread([run.error for run in runs], 4), f"{statistics.mean(run.off for run in runs):.3f}"]
        cells.append(row)
    head = ["option", *itertools.chain.from_iterable((f"`{w}`: test error", "weights off") for w in WEIGHTINGS)]
    halves = [run for weighting in WEIGHTINGS for run in done[OPTIONS[-1], weighting]]
    error, bias, difference = (100 * statistics.mean(run.spread[n] for run in halves) ** 0.5 for n in range(3))
    text = (
        "Of the two halves, root mean squares over probed steps in percent of the norm of the Gram: standard error "
        f"{error:.0f}, bias {bias:.0f}, both as estimated; difference from the Gram of the whole batch, which has the rows: "
        f"{difference:.0f}."
    )
    equal = spread([run.error for run in done["none", "mean"]], 4)
    return f"{table([head, *cells])}\n\nEqual weights: {equal}.\n\n{text}"


def in_short(measured: dict[str, dict[str, Row]]) -> str:
    """Times of all methods and cases in one table."""
    head = ["time of a step", *(f"{name.rstrip('248')}, {CASES[name].num_tasks} losses" for name in measured)]
    return table([head, *([method, *(f"{rows[method].time:.2f}" for rows in measured.values())] for method in METHODS)])


def page(measured: dict[str, dict[str, Row]], parts: Sequence[str], effect: str, options: argparse.Namespace) -> str:
    ratios = [
        rows["ours, batched backward pass"].parts["backward"] / rows["ours"].parts["backward"] for rows in measured.values()
    ]
    intro = (
        f"Written by `python -m benchmarks.step_share{options.changed}`; do not edit.\n\n"
        "Time and its parts are in units of the plain step of the same round, medians of at least three rounds in which all "
        "methods take turns; thread time of one CPU thread, float32, random data. Peak memory: the most that a step allocates "
        "beyond parameters and optimizer state, over the plain step's. All weights are IMTL-G's, the inner optimizer is fused "
        "AdamW, heads are linear. *backward* has all backward passes. *combine* has Gram and weights, too, for TorchJD and "
        "compiled PyTorch (flat gradients, G G', pinv, w G in one `torch.compile`); autogram's own pass is in *backward*. "
        "TorchJD runs `mtl_backward` and `jac_to_grad`, all losses in one vectorised pass, which is its default; *flag* is "
        "`optimize_gramian_computation=True`."
    )
    options_text = (
        "`update_every`, `representation=` and `gram_losses=` are options of `MultiTaskOptimizer`; "
        "[training_loops.md](training_loops.md#fewer-backward-passes) says when each is exact. The batched backward pass, "
        "`torch.autograd.grad(..., is_grads_batched=True)`, gives the same gradients and is no option: it took "
        f"{min(ratios):.2f} to {max(ratios):.2f} times as long as a backward pass for each loss (in the transformer torch has "
        "no batching rule for the backward pass of its CPU attention). Its step goes round the optimizer, whose bookkeeping, "
        "*rest*, shows in steps of a few milliseconds."
    )
    effect_text = (
        f"{options.seeds} seeds of {options.steps} batches of {BATCH}, as in [compare.md](compare.md): mean test error ± "
        "standard deviation. *Weights off*: sum_k |w_k - v_k| / sum_k |v_k| with v the weights of the whole batch's gradients "
        f"at the same parameters, the mean over every {PROBE}th step."
    )
    sections = ["# The share of a step", intro, options_text, in_short(measured), "## Where time and memory go", *parts]
    return "\n\n".join([*sections, "## Effect on the result: MultiDigits", effect_text, effect]) + "\n"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seconds", type=float, default=5.0, help="CPU seconds of each case; at least three rounds")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="folder of the page")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(argv)
    options.changed = " --quick" if options.quick else ""
    if options.cases != list(CASES):
        options.changed += f" --cases {' '.join(options.cases)}"
    if options.quick:
        options.cases = [name for name in options.cases if name in QUICK] or options.cases
        options.seconds, options.seeds, options.steps = 0.0, 2, 20
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    torch.set_num_threads(1)
    parts, measured = [], {}
    for name in options.cases:
        started = time.monotonic()
        measured[name], *base = measure(CASES[name], options.seconds)
        parts.append(of_case(CASES[name], measured[name], *base))
        print(f"{parts[-1]}\n\n({time.monotonic() - started:.0f} s)\n", flush=True)
    text = page(measured, parts, of_effects(effects(options.steps, options.seeds)), options)
    (options.output / "step_share.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
