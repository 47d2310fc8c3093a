"""Peak memory of whole training steps, for every way to hold the gradients of K tasks: ``python -m benchmarks.memory``.

The transformer of 7M parameters with 2, 4 and 8 losses and ResNet-18 with 3, as in ``benchmarks/step_share.py``, each against
plain training and TorchJD's autogram, interleaved in one run on one thread. All weights are PCGrad's, which every mode has.

    python -m benchmarks.memory            minutes: docs/memory.md
    python -m benchmarks.memory --quick    one round, with fewer models: a look, not a result
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import mtlkernels as mtl
from mtlkernels.optim import host
from mtlkernels.optim.choose import PLAIN

from .race import peak_bytes
from .step_share import CASES as STEPS
from .step_share import Case, Clock, Setup, autogram, plain, table

ROOT = Path(__file__).parent.parent
AUTOGRAM = "TorchJD, autogram"
CASES = {
    **{name: STEPS[name] for name in ("transformer2", "transformer4", "transformer8")},
    "resnet": replace(STEPS["resnet"], title="ResNet-18, 32 pictures of 64 x 64", inputs=lambda: torch.randn(32, 3, 64, 64)),
}
QUICK = ("transformer2",)
LIMIT = 1.25
"""Of plain training's peak: what the streamed mode may take with up to eight tasks."""
CLOSE = 1e-6
"""How far its Gram may be off."""

Step = Callable[[], Tensor | None]
"""A training step; returns the Gram that its weights came from where it is one of all gradients."""


# --- the modes ------------------------------------------------------------------------------------------------------------


def optimizer_of(setup: Setup, **options: Any) -> mtl.MultiTaskOptimizer:
    heads = {k: head.parameters() for k, head in enumerate(setup.heads)}
    return mtl.MultiTaskOptimizer(setup.inner, "pcgrad", shared=setup.shared, heads=heads, **options)


def sum_of_losses(setup: Setup) -> Step:
    step = plain(setup)
    return lambda: step() and None  # type: ignore[func-returns-value]


def with_rows(setup: Setup, rows: Any) -> Step:
    optimizer = optimizer_of(setup, rows=rows)
    return lambda: optimizer.step(setup.losses()[0]).gram


def cut_at(trunk: nn.Module) -> list[nn.Module]:
    """The blocks that a model is a sequence of."""
    layers = getattr(trunk, "layers", trunk)
    return [block for block in layers if next(block.parameters(), None) is not None and not isinstance(block, nn.Conv2d)]


def streamed(setup: Setup) -> Step:
    optimizer, blocks = optimizer_of(setup), cut_at(setup.trunk)

    def step() -> Tensor | None:
        with mtl.cut(blocks) as cuts:
            losses, _ = setup.losses()
        return optimizer.step(losses, cuts=cuts).gram

    return step


def at_representation(setup: Setup) -> Step:
    optimizer = optimizer_of(setup)

    def step() -> None:
        losses, z = setup.losses()
        optimizer.step(losses, representation=z)

    return step


MODES: dict[str, tuple[Callable[[Setup], Step], str]] = {
    PLAIN: (sum_of_losses, "-"),
    "stored": (partial(with_rows, rows="stored"), "yes"),
    "streamed, `cuts=`": (streamed, "yes"),
    '`rows="host"`': (partial(with_rows, rows="host"), "yes"),
    '`rows="bfloat16"`': (partial(with_rows, rows="bfloat16"), "to 2^-9"),
    '`rows="online"`': (partial(with_rows, rows="online"), "with 2 tasks"),
    "`representation=`": (at_representation, "no"),
    AUTOGRAM: (partial(autogram, method="PCGradWeighting"), "yes"),
}
"""How each is made, and whether its update is that of stored gradients."""


# --- measuring ------------------------------------------------------------------------------------------------------------


class Memory:
    """Memory of another device's host: outside of torch's allocator, so that no peak counts it, but counted here."""

    def __init__(self) -> None:
        self.bytes = 0

    def empty(self, param: Tensor, dtype: torch.dtype) -> Tensor:
        size = param.numel() * dtype.itemsize
        self.bytes += size
        flat = torch.frombuffer(bytearray(max(size, 1)), dtype=torch.uint8)[:size].view(dtype)
        return flat.as_strided(param.shape, torch.empty_like(param, device="meta").stride())

    @contextmanager
    def in_use(self) -> Iterator[None]:
        with mock.patch.object(host, "_empty_on_host", self.empty):
            yield


@dataclass(frozen=True)
class Row:
    """One mode."""

    peak: float
    """Over plain training's, parameters and optimizer state included."""
    host: int
    """Bytes."""
    time: float
    """Median over the rounds, in units of the plain step of the same round."""
    off: float | None
    """max |G - stored G| / sqrt(stored G_ii G_jj); None without such a Gram."""


def held(setup: Setup) -> int:
    """Bytes of parameters and optimizer state."""
    params = [p for group in setup.inner.param_groups for p in group["params"]]
    return sum(t.nbytes for t in (*params, *(t for p in params for t in setup.inner.state[p].values())))


def peak(setup: Setup, step: Step) -> int:
    """Bytes of a step that starts without ``.grad``, and without garbage of others whose end would count as its own."""
    setup.inner.zero_grad()
    gc.collect()
    return peak_bytes(step) + held(setup)


def measure(case: Case, rounds: int) -> tuple[dict[str, Row], float]:
    """Rows of all modes; megabytes of plain training."""
    memory, clock = Memory(), Clock()
    setups = {name: Setup(case, clock) for name in MODES}
    steps = {name: make(setups[name]) for name, (make, _) in MODES.items()}
    times: dict[str, list[float]] = {name: [] for name in MODES}
    with memory.in_use():
        grams = {name: step() for name, step in steps.items()}  # from the same weights; state is allocated
        for _ in range(rounds):
            for name, step in steps.items():
                start = time.thread_time()
                step()
                times[name].append(time.thread_time() - start)
        peaks = {name: peak(setups[name], step) for name, step in steps.items()}
        memory.bytes = 0
        steps['`rows="host"`']()
    base = times[PLAIN]
    rows = {
        name: Row(
            peaks[name] / peaks[PLAIN],
            memory.bytes if "host" in name else 0,
            statistics.median(own / b for own, b in zip(times[name], base, strict=True)),
            off(grams[name], grams["stored"]),
        )
        for name in MODES
    }
    return rows, peaks[PLAIN] / 1e6


def off(gram: Tensor | None, stored: Tensor | None) -> float | None:
    if gram is None or stored is None:
        return None
    norms = stored.diagonal().sqrt()
    return float(((gram.double() - stored).abs() / torch.outer(norms, norms)).max())


# --- the page -------------------------------------------------------------------------------------------------------------


def of_case(case: Case, rows: dict[str, Row], megabytes: float) -> str:
    head = ["mode", "peak", "host MB", "time", "exact", "Gram off"]
    cells = [
        [
            name,
            f"{row.peak:.2f}",
            f"{row.host / 1e6:.0f}" if row.host else "-",
            f"{row.time:.2f}",
            MODES[name][1],
            "-" if row.off is None or name == "stored" else f"{row.off:.0e}",
        ]
        for name, row in rows.items()
    ]
    return f"### {case.title}, {case.num_tasks} losses\n\nPlain training: {megabytes:.0f} MB.\n\n{table([head, *cells])}"


def verdict(measured: dict[str, dict[str, Row]]) -> str:
    """What was aimed at, beside what was measured."""
    name = "streamed, `cuts=`"
    lines = [
        f"{CASES[case].title}, {CASES[case].num_tasks} losses: streamed {rows[name].peak:.2f}, stored "
        f"{rows['stored'].peak:.2f}, autogram {rows[AUTOGRAM].peak:.2f}; the streamed Gram is off by {rows[name].off:.0e}"
        for case, rows in measured.items()
    ]
    worst, off_by = (max(getattr(rows[name], what) for rows in measured.values()) for what in ("peak", "off"))
    met = [
        f"{number} at most: {'met' if fits else 'missed'}"
        for number, fits in ((f"{worst:.2f}", worst <= LIMIT), (f"{off_by:.0e}", off_by <= CLOSE))
    ]
    return (
        f"Aimed at: streamed at most {LIMIT} times plain training ({met[0]}), with a Gram within {CLOSE:.0e} of the stored one "
        f"({met[1]}). Peaks over plain training's:\n\n" + "\n".join(f"- {line}." for line in lines)
    )


CHOOSING = """## How to choose

`print(mtl.choose_memory(model.encoder.parameters(), 8, 2e9, modules=model.encoder.blocks))` lists what the gradients of eight
tasks take in each mode, says why a mode is out, and picks the first that fits two gigabytes, exact ones first. In words:

1. **Stored** takes K gradients of the shared parameters, P bytes each. Where activations are most of the memory that is
   little; but those are freed while the last backward pass goes on, and K - 1 gradients are there beside all of them.
2. **Streamed** (`cuts=`) needs K gradients of one segment, and K at a cut, beside the activations, for one backward pass
   more. Exact. It wants a model that a few modules cut; [training_loops.md](training_loops.md#less-memory) has what it
   refuses.
3. **`rows="host"`** has the update and two blocks of 8 MB on the device, and K P in the host's page-locked memory. Each
   gradient is copied the moment that autograd has it, on a stream of its own, while the pass goes on; Gram and combination
   get it back block by block, the next one copied while one is read. A step moves K P to the host and 2 K P back. Exact. On
   the CPU it saves nothing: the table counts what a device would hold, and no bus is in its time. **The code with streams has
   not run on a GPU.**
4. **`rows="bfloat16"`** has K P / 2 of float32 gradients. A hook of each parameter rounds, so that no float32 gradient of the
   whole model is there beside them (with `gradients="backward"` one is). An element is off by up to 2^-9 of itself, about
   2e-3. In the Gram errors cancel: an entry is off by less than that times the norms, as the last column has it. In the
   update they do not where gradients cancel: the error is of the size of what cancelled. The update is rounded as well, then
   widened.
5. **`rows="online"`** has two gradients. For each task's gradient g, in random order, drawn as PCGrad draws, the sum d
   becomes (1 - c / |d|^2) d + (1 - c / |g|^2) g with c = min(0, <g, d>). Of two tasks that is PCGrad; of more it is an
   approximation, this package's own, in which earlier gradients count by their sum: the update never opposes the last
   gradient, and may oppose an earlier one. No Gram of all tasks is known, so `info.gram` is None; `info.weights` are those of
   the sum. Each arrival reads two gradients twice and writes one.
6. **`representation=`** has K gradients of what the heads are given, and one of the model; the weights are others
   ([training_loops.md](training_loops.md#fewer-backward-passes)).

```python
import torch
import mtlkernels as mtl

encoder = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Tanh(), torch.nn.Linear(64, 16))
heads = torch.nn.ModuleList(torch.nn.Linear(16, 1) for _ in range(4))
inner = torch.optim.AdamW([*encoder.parameters(), *heads.parameters()], 1e-3)
choice = mtl.choose_memory(encoder.parameters(), 4, budget=18_000, weighting="pcgrad")
print(choice)
optimizer = mtl.MultiTaskOptimizer(inner, "pcgrad", shared=encoder.parameters(), rows=choice.chosen)
features = encoder(torch.randn(32, 8))
info = optimizer.step([head(features).square().mean() for head in heads])
```

| | `cuts=` | `rows="host"` | `rows="bfloat16"` | `rows="online"` |
|---|---|---|---|---|
| weightings | of one batch's Gram | of Grams | all of gradients | PCGrad |
| `per` | model | model, tensor, groups | all | model |
| `accumulate` | no: `backward` for each micro-batch | no, likewise | yes, summed in bfloat16 | no, likewise |
| `update_every` | no | yes | yes | yes |
| `fused=True` | yes | no | no | yes |
| `weights_from="previous"` | no | no | no | no |
| several ranks, DTensors | ranks yes, DTensors no | no | no | no |
| `GradScaler`, `max_norm`, `on_nonfinite`, absent tasks, heads, checkpoints | yes | yes | yes | yes |

What is refused raises a `ValueError` that says why. `cuts=` takes no `update_every`: between updates a step takes one whole
backward pass, which a cut graph does not have. It takes no DTensors, whose gradients appear when a whole backward pass has run
its hooks; nor does `rows`, since ranks exchange gradients as they are. A step that takes its weights from `cuts=` or
`representation=` holds no rows, whatever `rows` is; those of `gram_losses=` are held like any. Between updates of
`update_every` one gradient is there, as it is. `rows` is no part of a checkpoint, and may change from run to run.
"""


def page(measured: dict[str, dict[str, Row]], parts: Sequence[str], changed: str) -> str:
    intro = (
        f"Written by `python -m benchmarks.memory{changed}`; do not edit.\n\n"
        "*peak* is the most that is allocated at a time in a step, parameters and optimizer state included, over plain "
        "training's: forward pass, backward passes and fused AdamW, float32, random data, linear heads; `.grad` is "
        "cleared before. *host MB* is what is in the host's memory instead. *time* is thread time of one CPU thread over "
        "that of the plain step of the same round, a median over rounds in which all modes take turns; *Gram off* is max "
        "|G - stored G| over the norms of the two gradients, at the same weights. Weights are PCGrad's. Cuts are behind "
        "every layer of the transformer, and every block of ResNet-18."
    )
    sections = ["# Memory for the gradients of K tasks", intro, verdict(measured), CHOOSING.rstrip(), "## Measured", *parts]
    return "\n\n".join(sections) + "\n"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="folder of the page")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error("--rounds is 1 or more")
    options.changed = " --quick" if options.quick else ""
    if options.cases != list(CASES):
        options.changed += f" --cases {' '.join(options.cases)}"
    if options.quick:
        options.cases, options.rounds = [name for name in options.cases if name in QUICK] or options.cases, 1
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    torch.set_num_threads(1)
    parts, measured = [], {}
    for name in options.cases:
        started = time.monotonic()
        measured[name], megabytes = measure(CASES[name], options.rounds)
        parts.append(of_case(CASES[name], measured[name], megabytes))
        print(f"{parts[-1]}\n\n({time.monotonic() - started:.0f} s)\n", file=sys.stderr, flush=True)
    text = page(measured, parts, options.changed)
    (options.output / "memory.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
