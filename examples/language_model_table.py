"""What does each method gain on language_model.py, and what does it cost? Every method and seed is a run of two processes.

Starts ``torchrun --nproc-per-node 2 examples/language_model.py`` for every method and seed, one after the other, and writes a
page with a table and a picture. Runs are kept in build/language_model: those that are there are not repeated, and the one that
was broken off goes on. One more run is killed on the way and started again, and compared with the one that was not.

    python examples/language_model_table.py            docs/language_model.md and .png
    python examples/language_model_table.py --quick    minutes: a look, not a result
"""

import argparse
import json
import math
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import language_model  # the examples beside this one
import numpy as np
import torch
from compare import parse_page, table
from language_model import Config, Trainer, checkpoints, read_lines
from text_domains import domains
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from mtlkernels import plot
from mtlkernels.demo import spread

ROOT = Path(__file__).parent.parent
METHODS = {
    "plain": "plain AdamW",
    "mean": "equal weights",
    "pcgrad": "PCGrad",
    "pcgrad tensor": "PCGrad per tensor",
    "cagrad": "CAGrad",
    "famo": "FAMO",
}
"""``--method``, and ``--per`` where it is not the model -> what the page calls it."""
RANKS = 2
KILLED = "pcgrad tensor"
"""The method of the run that is killed: it has weights of its own for every tensor and random orders."""


@dataclass(frozen=True)
class Run:
    """What one method did from one seed."""

    lines: list[dict[str, Any]]
    """Of log.jsonl, one for each step."""
    peak: int
    """Bytes that the first rank allocates in a step beyond what is there between steps; of the method, for any seed."""

    @property
    def bits(self) -> dict[int, dict[str, float]]:
        """Step -> bits per byte of each domain."""
        return {line["step"]: line["bits"] for line in self.lines if "bits" in line}

    @property
    def last(self) -> dict[str, float]:
        return self.lines[-1]["bits"]

    @property
    def conflicts(self) -> float | None:
        """Percentage of conflicting pairs over the steps, and over the tensors where each has weights; None: not known."""
        shares = [np.mean(line["conflicts"]) for line in self.lines if line.get("conflicts") is not None]
        return 100 * float(np.mean(shares)) if shares else None

    @property
    def step_ms(self) -> float:
        """CPU milliseconds of a step on the first rank."""
        return 1e3 * self.lines[-1]["seconds"] / self.lines[-1]["step"]


# --- runs ---------------------------------------------------------------------------------------------------------------------


def arguments(method: str, seed: int, steps: int) -> list[str]:
    """Of language_model.py, but for its folder."""
    name, *per = method.split()
    every = ["--eval-every", str(max(1, steps // 12)), "--save-every", str(save_every(steps))]
    return ["--method", name, *(["--per", *per] if per else []), "--seed", str(seed), "--steps", str(steps), *every]


def save_every(steps: int) -> int:
    return max(1, steps // 6)


def torchrun(script: str, *argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command += [str(ROOT / "examples" / script), *argv]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def checked(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode:
        raise RuntimeError(f"{' '.join(done.args)} ended with {done.returncode}:\n{done.stderr[-4000:]}")


def completed(folder: Path, method: str, seed: int, steps: int) -> Run:
    """The run that is in the folder, after what it still lacks."""
    path, peak = folder / "log.jsonl", folder.with_name(f"{folder.name.rpartition('-')[0]}-peak.json")
    if not path.exists() or read_lines(path)[-1]["step"] < steps:
        checked(torchrun("language_model.py", *arguments(method, seed, steps), "--folder", str(folder)))
    if not peak.exists():
        checked(torchrun("language_model_table.py", "--worker", "probe", str(peak), *arguments(method, seed, steps)))
    return Run(read_lines(path), json.loads(peak.read_text()))


def killed_and_resumed(folder: Path, steps: int) -> Path:
    """The folder of a run that was killed once, and completed by the command that had started it."""
    argv = [*arguments(KILLED, 0, steps), "--folder", str(folder)]
    path = folder / "log.jsonl"
    if path.exists() and read_lines(path)[-1]["step"] == steps:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    if torchrun("language_model_table.py", "--worker", "dying", str(died_after(steps)), *argv).returncode == 0:
        raise RuntimeError(f"the run in {folder} was to be killed, and was not")
    if not checkpoints(folder) or read_lines(path)[-1]["step"] >= died_after(steps):
        raise RuntimeError(f"the run in {folder} was to be killed after a checkpoint, at step {died_after(steps)}")
    checked(torchrun("language_model.py", *argv))
    return folder


def died_after(steps: int) -> int:
    """The step between two checkpoints after which the run is killed."""
    return steps // 2 + max(1, steps // 12)


def saved_before(step: int, steps: int) -> int:
    """The step of the last checkpoint before it."""
    return step // save_every(steps) * save_every(steps)


def differences(first: Path, second: Path) -> list[str]:
    """In what the logs and last checkpoints of two runs differ; without times, which are never the same."""
    logs = [
        [{name: value for name, value in line.items() if name != "seconds"} for line in read_lines(folder / "log.jsonl")]
        for folder in (first, second)
    ]
    states = []
    for folder in (first, second):
        file = folder / "last.pt"
        dcp_to_torch_save(checkpoints(folder)[-1], file)
        states.append(torch.load(file, weights_only=False))
        file.unlink()
    return [name for name, equal in (("log", logs[0] == logs[1]), ("checkpoint", equal_trees(*states))) if not equal]


def equal_trees(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal_trees(value, second[name]) for name, value in first.items())
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(equal_trees, first, second))
    return first == second


def worker(kind: str, value: str, argv: Sequence[str]) -> None:
    """One rank of a run for this script: ``"probe"`` measures a step and writes ``value``, ``"dying"`` dies after ``value``."""
    if kind == "probe":
        sys.path.insert(0, str(ROOT))
        from benchmarks.race import peak_bytes

        torch.set_num_threads(1)
        language_model.start_process_group()
        trainer = Trainer(language_model.parse(argv)[0])
        for _ in range(2):  # until optimizer state is there
            trainer.step()
        peak = peak_bytes(trainer.step)
        if trainer.rank == 0:
            Path(value).write_text(json.dumps(peak))
        torch.distributed.destroy_process_group()
        return
    step = Trainer.step

    def dying(self: Trainer) -> dict[str, Any]:
        told = step(self)
        if self.step_number == int(value):
            os.kill(os.getpid(), signal.SIGKILL)
        return told

    Trainer.step = dying  # type: ignore[method-assign]
    language_model.main(argv)


# --- page ---------------------------------------------------------------------------------------------------------------------


def rows_of(runs: dict[str, list[Run]]) -> list[list[str]]:
    """Header and a row for each method."""
    plain = runs["plain"]
    names = list(plain[0].last)
    result = [["method", *names, "mean, less plain's", "conflicts, %", "step, of plain's", "peak, MB"]]
    for method, done in runs.items():
        gaps = [mean_bits(run) - mean_bits(base) for run, base in zip(done, plain, strict=True)]
        times = [run.step_ms / base.step_ms for run, base in zip(done, plain, strict=True)]
        shares = [run.conflicts for run in done if run.conflicts is not None]
        result.append([METHODS[method], *(spread([run.last[name] for run in done], 3) for name in names)])
        result[-1] += ["-" if method == "plain" else spread(gaps, 3, "+"), spread(shares, 0) if shares else "-"]
        result[-1] += ["1" if method == "plain" else spread(times, 2), f"{done[0].peak / 1e6:.1f}"]
    return result


def mean_bits(run: Run) -> float:
    return statistics.mean(run.last.values())


def verdict(runs: dict[str, list[Run]]) -> str:
    """What the numbers say, by a rule: differences seed by seed against two standard errors of their mean."""
    parts = []
    for method, done in runs.items():
        if method == "plain":
            continue
        gaps = [mean_bits(run) - mean_bits(base) for run, base in zip(done, runs["plain"], strict=True)]
        error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.inf
        mean = statistics.mean(gaps)
        word = "not told apart" if abs(mean) <= 2 * error else "better" if mean < 0 else "worse"
        parts.append(f"{METHODS[method]} {word}")
    return (
        "From plain AdamW, in the mean of the domains and by two standard errors of the differences: " + "; ".join(parts) + "."
    )


def report(runs: dict[str, list[Run]], options: argparse.Namespace) -> str:
    config, steps = Config(), options.steps
    number = sum(param.numel() for param in language_model.ByteModel(config).parameters())
    texts = domains(config.domains, config.max_bytes)
    sizes = [["domain", "training bytes", "documents", "test bytes", "documents"]]
    for name, text in texts.items():
        parts = ((text.train, text.train_documents), (text.test, text.test_documents))
        sizes.append([name, *(f"{len(value):,}" for part in parts for value in part)])
    script = "torchrun --nproc-per-node 2 examples/language_model.py"
    calls = [" ".join([script, *arguments(method, 0, steps)]) for method in METHODS]
    about = one_line(f"""
        Written by `python examples/language_model_table.py{options.changed}`: {options.seeds} seeds of {steps} steps, mean
        ± standard deviation. A seed has its own initial weights and order of the rows, the same for all methods; nothing
        was tuned for a method. Two processes on CPUs with gloo, FSDP2, bfloat16 passes, float32 parameters; Python
        {platform.python_version()}, torch {torch.__version__.partition("+")[0]}.
    """)
    columns = one_line(f"""
        Bits per byte of {config.eval_rows} rows of each test part at the end, fewer is better; the mean of the domains
        less that of plain AdamW with the same seed. Conflicts: pairs of domains with gradients of a negative cosine, over
        all steps (and tensors, where each has its own weights); FAMO and plain AdamW do not know. Step: CPU time of a rank
        over that of plain AdamW with the same seed. Peak: what a rank allocates in a step beyond what is there between
        steps. Plain AdamW is the mean of the losses without a line of mtlkernels; equal weights take the same update, and
        what the two differ by is what the rounding of bfloat16 comes to by the end. Few seeds, and runs that end
        long before the losses stop falling, say little about long ones.
    """)
    kill = one_line(f"""
        Both ranks of one more run of {METHODS[KILLED]}, seed 0, killed themselves by SIGKILL after step
        {died_after(steps)}; `{script}` with the same arguments went on from the checkpoint of step
        {saved_before(died_after(steps), steps)}. Its log of {steps} steps (losses, norms, conflicts, bits per byte) and
        its last checkpoint (parameters, AdamW's state, the weighting's, the place in the data, the schedule) have the same
        bits as those of the run that nobody disturbed: the script compares them, and ends with an error otherwise.
    """)
    model = one_line(f"""
        A transformer over bytes of {number:,} parameters, all shared: {config.layers} layers of width {config.width},
        {config.heads} heads, {config.context} bytes of context. A step has {config.batch} rows of each domain, half of
        them on each rank, in {config.micro_batches} micro-batches; AdamW at {config.lr}, warm-up and half a cosine to a
        tenth, clipped at {config.max_norm:g} (PCGrad's sum of {len(texts)} gradients at {len(texts)} times that). A
        micro-batch has the rows of one domain and goes to `accumulate`, the last one of a step to `step`: the backward
        passes of all domains together are as long as that of their mean, and one graph is there at a time. FAMO weighs
        losses, which have to be there together, so it runs all rows of a step before its one backward pass, and once more
        after the step.
    """)
    source = one_line(f"""
        `examples/text_domains.py` takes them from what is installed, {config.max_bytes:,} bytes a domain at most, split by
        document. `--domains python headers topics smiles` adds molecules, where qm9pack is installed.
    """)
    image = "![Bits per byte of each domain over steps, and less those of plain AdamW](language_model.png)"
    each = "Each run is one of these, with its `--seed` and a `--folder` for its checkpoints:"
    parts = ["# A language model on three kinds of text", about, table(rows_of(runs)), verdict(runs), columns, image]
    parts += ["## Killed and resumed", kill, "## Model", model, "## Texts", source, table(sizes)]
    return "\n\n".join([*parts, "## Commands", each, "```\n" + "\n".join(calls) + "\n```"]) + "\n"


def one_line(text: str) -> str:
    return " ".join(text.split())


def picture(runs: dict[str, list[Run]]) -> plot.Figure:
    """Above bits per byte, below the difference from plain AdamW: means of the seeds, with their range as a band."""
    names = list(runs["plain"][0].last)
    figure = plot._new_figure((4.4 * len(names), 7.2))
    above, below = figure.subplots(2, len(names), squeeze=False, sharex=True)
    for name, upper, lower in zip(names, above, below, strict=True):
        plot._style(upper, name)
        plot._style(lower, "")
        base = curves(runs["plain"], name)
        for method, colour in zip(runs, plot.COLOURS, strict=False):
            values, steps = curves(runs[method], name), list(runs[method][0].bits)
            for axes, shown in ((upper, values), (lower, values - base)):
                axes.fill_between(steps, shown.min(0), shown.max(0), color=colour, alpha=0.12, linewidth=0)
                axes.plot(steps, shown.mean(0), color=colour, linewidth=1.6, label=METHODS[method])
        lower.set_xlabel("step")
    above[0].set_ylabel("bits per byte of the test part")
    below[0].set_ylabel("less plain AdamW's")
    above[-1].legend(frameon=False, fontsize=9)
    return figure


def curves(done: Sequence[Run], name: str) -> "np.ndarray[Any, Any]":
    """[seeds, evaluations]."""
    return np.array([[bits[name] for bits in run.bits.values()] for run in done])


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["--worker"]:
        worker(argv[1], argv[2], argv[3:])
        return 0
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "language_model", help="folder of the runs")
    options = parse_page(parser, argv, steps=Config.steps)
    options.changed = " --quick" if options.quick else ""
    for name in () if options.quick else ("seeds", "steps"):
        if getattr(options, name) != parser.get_default(name):
            options.changed += f" --{name} {getattr(options, name)}"
    work = options.work / f"{options.steps}-steps"
    runs: dict[str, list[Run]] = {method: [] for method in METHODS}
    for seed in range(options.seeds):
        for method, done in runs.items():
            done.append(completed(work / f"{method.replace(' ', '-')}-{seed}", method, seed, options.steps))
            bits = ", ".join(f"{name} {value:.3f}" for name, value in done[-1].last.items())
            print(f"seed {seed}  {METHODS[method]:18s} {bits}  {done[-1].step_ms:.0f} ms", flush=True)
    undisturbed, resumed = work / f"{KILLED.replace(' ', '-')}-0", killed_and_resumed(work / "killed", options.steps)
    differ = differences(undisturbed, resumed)
    if differ:
        print(f"the run that was killed and resumed has another {' and '.join(differ)}", file=sys.stderr)
        return 1
    text = report(runs, options)
    picture(runs).savefig(options.output / "language_model.png", dpi=80)
    (options.output / "language_model.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
