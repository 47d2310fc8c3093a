"""``python -m mtlkernels plan``: a table of what every mode takes, with what it rests on."""

import argparse
import importlib.util
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict

from ..hardware import GPUS, Gpu
from .modes import MODES, Plan, plans
from .step import ACTIVATIONS, BUCKET, STATES, WIDENED, WORK, Setting, Shape

DTYPES = {"bfloat16": 2, "bf16": 2, "float16": 2, "fp16": 2, "float32": 4, "fp32": 4}


def transformer(params: float, layers: int) -> list[list[Shape]]:
    """Shapes of ``layers`` blocks of a transformer that has about so many parameters: 12 width^2 + 2 width in each.

    Queries, keys and values in one matrix, the attention's result, four times as wide layers between, two norms; no biases.
    """
    width = max(round((math.sqrt(4 + 48 * params / layers) - 2) / 24), 1)
    block = [(width,), (3 * width, width), (width, width), (width,), (4 * width, width), (width, 4 * width)]
    return [block] * layers


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mtlkernels plan",
        description="What a step of multi-task training takes, by arithmetic: bytes, collectives, launches, peak memory of a "
        "rank, and a lower bound of the time from datasheet figures. Nothing is run or measured.",
    )
    add = parser.add_argument
    add("--params", type=number, required=True, help="shared parameters, for example 7e9")
    add("--tasks", type=whole_number, required=True, help="tasks")
    add("--gpus", type=whole_number, default=1, help="data-parallel ranks (default: %(default)s)")
    add("--gpu", type=_gpu, default="H100", help=f"one of {', '.join(GPUS)} (default: %(default)s)")
    add("--node", type=whole_number, default=8, help="GPUs of a node, which a fast link joins (default: %(default)s)")
    add("--sharding", choices=("fsdp", "ddp"), default="fsdp", help="with several GPUs (default: %(default)s)")
    add("--dtype", type=_dtype, default="bfloat16", help="of parameters, gradients, state: bf16, fp16, fp32 (default: bf16)")
    add("--master-weights", action="store_true", help="float32 copies and states of 16-bit parameters, by MasterWeights")
    add("--optimizer", choices=STATES, default="adamw", help="torch optimizer, fused (default: %(default)s)")
    add("--layers", type=whole_number, default=32, help="blocks that the shared parameters make (default: %(default)s)")
    add("--head-params", type=number, default=0.0, help="parameters of each task's head (default: 0)")
    add("--tokens", type=whole_number, default=4096, help="tokens, or samples, of a rank and step (default: %(default)s)")
    add("--checkpointing", action="store_true", help="blocks keep their input only, and run again in each backward pass")
    add("--activation-bytes", type=number, help="bytes kept for the backward pass (default: those of a transformer)")
    add("--sub-batch", type=share, default=0.25, help="part of the batch for gram_losses (default: %(default)s)")
    add("--update-every", type=whole_number, default=4, help="n of update_every (default: %(default)s)")
    add("--json", action="store_true", help="everything as JSON")
    options = parser.parse_args(argv)
    if options.params < options.layers:
        parser.error(f"--params: {options.params:g} parameters do not make {options.layers} blocks; pass --layers")
    if options.master_weights and DTYPES[options.dtype] == 4:
        parser.error("--master-weights: the parameters are float32 already; leave it out, or pass --dtype bf16")
    if options.activation_bytes is not None and options.checkpointing:
        parser.error("--checkpointing: --activation-bytes says what is kept; leave one of the two out")
    return options


def number(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of 0 or more")
    return value


def whole_number(text: str) -> int:
    value = number(text)
    if value < 1 or value != int(value):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of 1 or more")
    return int(value)


def share(text: str) -> float:
    value = number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a part of the batch; pass more than 0, and up to 1")
    return value


def _gpu(text: str) -> str:
    found = next((name for name in GPUS if name.lower() == text.lower()), None)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text} is unknown; pass one of {', '.join(GPUS)}")
    return found


def _dtype(text: str) -> str:
    if text not in DTYPES:
        raise argparse.ArgumentTypeError(f"{text} is unknown; pass one of {', '.join(DTYPES)}")
    return text


def setting_of(options: argparse.Namespace) -> Setting:
    """What the arguments describe."""
    blocks = transformer(options.params, options.layers)
    (width,) = blocks[0][0]
    rows = math.ceil(options.head_params / width)
    return Setting(
        blocks,
        [[(rows, width)] if rows else []] * options.tasks,
        options.tokens,
        width,
        DTYPES[options.dtype],
        options.optimizer,
        options.master_weights,
        options.gpus,
        options.sharding if options.gpus > 1 else "none",
        options.checkpointing,
        options.activation_bytes,
        options.sub_batch,
        options.update_every,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the plans, or their JSON."""
    options = parse(argv)
    setting, gpu = setting_of(options), GPUS[options.gpu]
    found = plans(setting)
    if options.json:
        print(json.dumps(_record(options, setting, found), indent=1))
        return 0
    head, rows = table(found, setting, gpu, options.node)
    title = f"One step of one rank of {setting.gpus}, {options.tasks} tasks, {gpu.title}: lower bounds, nothing measured"
    if sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
        _print_rich(title, head, rows)
    else:
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        print(title, "", *(_line(row, widths) for row in (head, *rows)), sep="\n")
    print("", *legend(setting), "", *assumptions(setting, gpu, options.node), sep="\n")
    return 0


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = row
    cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
    return "  ".join(cells).rstrip()


def _print_rich(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for n, name in enumerate(head):
        shown.add_column(name, justify="right" if n else "left")
    for row in rows:
        shown.add_row(*row)
    Console().print(shown)


def table(found: Sequence[Plan], setting: Setting, gpu: Gpu, node: int) -> tuple[list[str], list[list[str]]]:
    """Heading and rows."""
    head = [
        "mode",
        "PFLOP",
        "ops GB",
        "optimizer GB",
        "launches",
        "collectives",
        "sent GB",
        "peak GB",
        "at least ms",
        "bound by",
    ]
    plain, _ = _seconds(found[0].times(setting, gpu, node))
    rows = []
    for own in found:
        seconds, bound = _seconds(own.times(setting, gpu, node))
        moved = [own.flops / 1e15, own.moved / 1e9, own.stepped / 1e9]
        counts = [own.launches, sum(own.collectives.values())]
        peak = f"{own.peak / 1e9:.4g}" + ("" if own.peak <= gpu.memory else " too much")
        cells = [*(f"{value:.4g}" for value in moved), *(f"{count:g}" for count in counts), f"{own.sent / 1e9:.4g}", peak]
        rows.append([own.mode, *cells, f"{1e3 * seconds:.4g} ({seconds / plain:.2f}x)", bound])
    return head, rows


def _seconds(times: dict[str, float]) -> tuple[float, str]:
    """The lower bound and what makes it."""
    busy, beside = times["compute"] + times["memory"], max(("network", "host"), key=lambda name: times[name])
    bound = beside if times[beside] > busy else max(("compute", "memory"), key=lambda name: times[name])
    return max(busy, times[beside]), bound


def assumptions(setting: Setting, gpu: Gpu, node: int) -> list[str]:
    """What the figures rest on."""
    shared, own = (setting.bytes_of(shapes) // setting.element for shapes in (setting.shared, setting.own))
    unit = "elements a token and unit of width"
    work = f"{WORK} to {WORK + WIDENED} more in its backward pass"
    if setting.activation_bytes is not None:
        kept = f"{setting.activation_bytes:.4g} bytes, as given; of a block {work}, {unit}"
    elif setting.checkpointing:
        kept = (
            f"the input of each block; all but its last layer runs again in its backward pass, of {ACTIVATIONS + WORK} {unit}"
        )
    else:
        kept = f"of a block {ACTIVATIONS} {unit} (Korthikanti et al. 2022, no attention scores kept), {work}"
    state = f"{setting.state_bytes} of {setting.optimizer}'s state" + (" and MasterWeights' copy" if setting.master else "")
    tera = (gpu.half_flops if setting.element == 2 else gpu.float_flops) / 1e12
    links = f"to the others of {node} in a node {gpu.node_link / 1e9:g} GB/s, to other nodes {gpu.network / 1e9:g}"
    return [
        f"Model: {len(setting.blocks)} transformer blocks of width {setting.width}, {shared:.4g} shared parameters in "
        f"{len(setting.shared)} tensors, {own:.4g} in heads.",
        f"Bytes of a parameter: {setting.element}, as many of a gradient and an activation, {state}.",
        f"Passes: {setting.tokens} tokens a rank; 2 operations a parameter and token forward, 4 backward; no attention scores.",
        f"Activations: {kept}.",
        "Peak: of the fullest rank, .grad cleared before the step; without fragmentation, workspaces and the CUDA context.",
        "Optimizer: torch's, fused. Its own step is not in ops and launches, nor are torch's kernels on K x K values.",
        *_ranks(setting),
        f"{gpu.title}, datasheet: {tera:g} TFLOP/s, {gpu.bandwidth / 1e9:g} GB/s, {gpu.memory / 1e9:g} GB, "
        f"{links}, to the host {gpu.host_link / 1e9:g}.",
        "At least: passes, ops and optimizer one after the other, or all that is sent, or comes back from the host, whichever "
        "is longest, at these figures.",
    ]


def _ranks(setting: Setting) -> list[str]:
    """What is communicated, and how."""
    if setting.gpus == 1:
        return []
    how = {
        "fsdp": "fsdp: fully_shard on each block and head, resharded after each pass, gradients reduced in their dtype",
        "ddp": f"ddp: buckets of {BUCKET / 2**20:g} MiB; the sum of losses under DistributedDataParallel, in its buckets",
    }
    return [f"{how[setting.sharding]}; rings, of which a rank sends (n - 1) / n of a tensor, twice in an all-reduce."]


def legend(setting: Setting) -> list[str]:
    """How each mode is chosen, and what is ruled out."""
    modes = {name: mode for name, mode in MODES.items() if mode.reason(setting) is None}
    width = max(map(len, modes))
    lines = [f"  {name:<{width}}  {mode.how}; weights: {mode.weights}" for name, mode in modes.items()]
    left = [f"{name} (with {mode.reason(setting)})" for name, mode in MODES.items() if name not in modes]
    return lines + ([f"Refused: {', '.join(left)}."] if left else [])


def _record(options: argparse.Namespace, setting: Setting, found: Sequence[Plan]) -> dict[str, object]:
    gpu = GPUS[options.gpu]
    modes = []
    for own in found:
        times = own.times(setting, gpu, options.node)
        seconds, bound = _seconds(times)
        kinds = [{"kind": kind, "bytes": size, "count": count} for (kind, size), count in own.collectives.items()]
        record = {"how": MODES[own.mode].how, "weights": MODES[own.mode].weights, **asdict(own), "collectives": kinds}
        modes.append({**record, "fits": own.peak <= gpu.memory, "seconds": times, "at_least": seconds, "bound_by": bound})
    return {
        "arguments": vars(options),
        "gpu": gpu._asdict(),
        "assumptions": assumptions(setting, gpu, options.node),
        "modes": modes,
    }
