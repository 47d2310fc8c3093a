"""Every kernel of the CUDA library: the op that launches it, what it compiles to, and what it moves.

The ops run as the library runs them, through its own launchers and bindings (simulated.py), in ptxsim; their machine code is
compiled from the library's own sources (sass.py). Nothing here names a kernel: a new one shows up by itself, and one that no op
of OPS launches is an error.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import ptxsim
import sass
import torch
from device import CSRC, setup_script
from ptxsim.roofline import Bounds, Chip, estimate
from simulated import Launch, library, simulated_cuda
from torch import Tensor

import mtlkernels as mtl
from mtlkernels.finish import combine_adam_, combine_sgd_
from mtlkernels.gram_combine import gram_combine_
from mtlkernels.memory import excess_risk, memory_combine_, memory_dtype

ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NUM_TASKS = (1, 2, 3, 4, 8, 16, 64)
"""A number of tasks for each class of it."""
LATENCY_SECONDS = 800e-9
"""From a load to its data, of a loaded memory; what is asked for in this time must be under way for a chip's full bandwidth."""
LARGE_MODEL = 10**9
"""Elements of the model whose waves are counted."""
CHUNK = 8192

FEW_WARPS = "registers or shared memory leave room for few warps"
EXCHANGES = "two instructions for each of 2 trim exchanges of a float32 or of two 16-bit gradients"
BELOW_BAR = [
    (r"gram_tensor_core<(float|double),(16|64)>", "B200", FEW_WARPS),
    (r"gram_tensor_core<double,64>", "A100 H200", FEW_WARPS),
    (r"gram_tensor_core<(BFloat16|__half),64>", "B200", FEW_WARPS),
    (r"gram_channels<(BFloat16|__half),64>", "H100 H200", FEW_WARPS),
    (r"gram_channels<((BFloat16|__half|double),8|.*,64)>", "B200", FEW_WARPS),
    (r"mix<(BFloat16|__half)>", "B200", FEW_WARPS),
    (r"priority_combine<(BFloat16|__half)>", "B200", FEW_WARPS),
    (r"priority_combine<__half>", "H100 H200", FEW_WARPS),
    (r"paired_gram_tensor_core<(float,16|.*,64)>", "B200", FEW_WARPS),
    (r"paired_gram_chunks<__half,4>", "B200", FEW_WARPS),
    (r"gram_combine_chunks<(.*,3|BFloat16,4|double,1)>", "B200", FEW_WARPS),
    (r"finish<(float,1,SgdOptions|double,1,AdamOptions|.*,64,AdamOptions)>", "B200", FEW_WARPS),
    (r"finish<double,8,AdamOptions>", "H200", FEW_WARPS),
    (r"graddrop<((BFloat16|__half),[12]|.*,64)>", "B200", FEW_WARPS),
    (r"memory_combine<(BFloat16|__half)>", "B200", FEW_WARPS),
    (r"trimmed_mean<.*,64,8>", "H100 H200 B200", EXCHANGES),
    (r"trimmed_mean<.*,64,32>", "A100 H100 H200 B200", EXCHANGES),
    (r"trimmed_mean<double,64,32>", "RTX4090", EXCHANGES),
]
"""(kernels, chips, why): what has too little under way for a chip's full bandwidth."""
PADDED_ROWS = "11 tasks cost what 16 do, 5 cost what 8 do; a float32 is three bfloat16 on the tensor cores"
AGAIN = "past 8 tasks, groups of rows are read again from the cache; and channels are short"
SHORT_CHANNELS = "a warp takes up weights and addresses anew for every channel, and channels are short"
SHORT_BLOCKS = "blocks are short, so that their gradients still lie in the L2 cache when they come again"
MANY_RESULTS = "K results of K rows take K multiply-adds an element"
FORMED = "differences have more bits than 16-bit gradients: past 4 tasks they are multiplied as float32, from three bfloat16"
NORMAL_NUMBERS = "a logarithm, a root and two cosines for every two elements, besides ten rounds of Philox for every four"
DIVISIONS = "a division for every element, and few bytes of them in 16 bits"
RANDOM_WORDS = "ten rounds of Philox for every four elements, and few bytes of them in 16 bits"
ROOTS = "a root and a division for every element, and few bytes of them in 16 bits"
SLOWER_THAN_DRAM = [
    ("gram", "B200", 1.5, PADDED_ROWS),
    ("cross_gram", "B200", 1.5, PADDED_ROWS),
    ("gram_combine_", "B200", 1.5, PADDED_ROWS),
    ("gram per channel", "A100 H100", 2.8, AGAIN),
    ("gram per channel", "H200", 3.7, AGAIN),
    ("gram per channel", "B200", 5.5, AGAIN),
    ("combine per channel", "B200", 1.5, SHORT_CHANNELS),
    ("flat_gram", "A100 H100", 1.9, FORMED),
    ("flat_gram", "H200", 2.6, FORMED),
    ("flat_gram", "B200", 3.7, FORMED),
    ("mix", "A100 H100", 1.9, MANY_RESULTS),
    ("mix", "H200", 2.5, MANY_RESULTS),
    ("mix", "B200", 3.6, MANY_RESULTS),
    ("priority_combine", "A100 H100", 1.3, SHORT_BLOCKS),
    ("priority_combine", "H200", 1.7, SHORT_BLOCKS),
    ("priority_combine", "B200", 2.6, SHORT_BLOCKS),
    ("graddrop", "A100 H100", 1.3, RANDOM_WORDS),
    ("graddrop", "H200", 1.8, RANDOM_WORDS),
    ("graddrop", "B200", 2.7, RANDOM_WORDS),
    ("gradient_dropout", "A100 H100", 1.9, NORMAL_NUMBERS),
    ("gradient_dropout", "H200", 2.6, NORMAL_NUMBERS),
    ("gradient_dropout", "B200", 3.9, NORMAL_NUMBERS),
    ("gradient_dropout bernoulli", "A100 H100", 1.2, RANDOM_WORDS),
    ("gradient_dropout bernoulli", "H200", 1.6, RANDOM_WORDS),
    ("gradient_dropout bernoulli", "B200", 2.3, RANDOM_WORDS),
    ("combine_adam_", "B200", 1.5, ROOTS),
    ("trimmed_mean", "B200", 1.2, DIVISIONS),
    ("trimmed_mean by 3", "H200", 1.4, EXCHANGES),
    ("trimmed_mean by 3", "B200", 2.0, EXCHANGES),
    ("median", "A100 H100", 2.2, EXCHANGES),
    ("median", "H200", 3.0, EXCHANGES),
    ("median", "B200", 4.4, EXCHANGES),
]
"""(op, chips, factor, why): what may take that much longer than DRAM does, in float32 and bfloat16, with 2 to 16 tasks."""


@dataclass
class Call:
    """One op with its operands. `streams`: the tensors that make up its traffic, gradients and combined gradients."""

    run: Callable[[], object]
    streams: list[Tensor]
    elements: int


def _gradients(num_tasks: int, dtype: torch.dtype, shape: tuple[int, ...] = (CHUNK,)) -> list[list[Tensor]]:
    torch.manual_seed(num_tasks)
    return [[torch.randn(shape).to(dtype)] for _ in range(num_tasks)]


def _gram(num_tasks: int, dtype: torch.dtype) -> Call:
    grads = _gradients(num_tasks, dtype)
    return Call(lambda: mtl.gram(grads), [row[0] for row in grads], CHUNK)


def _cross_gram(num_tasks: int, dtype: torch.dtype) -> Call:
    rows = _gradients(max(num_tasks, 2), dtype)  # of both operands together
    half = len(rows) // 2
    return Call(lambda: mtl.gram(rows[:half], rows[half:]), [row[0] for row in rows], CHUNK)


def _gram_per_channel(num_tasks: int, dtype: torch.dtype) -> Call:
    grads = _gradients(num_tasks, dtype, (64, 64, 3, 3))  # a convolution of ResNet-50
    return Call(lambda: mtl.gram(grads, per="channel"), [row[0] for row in grads], 64 * 64 * 9)


def _combine(num_tasks: int, dtype: torch.dtype) -> Call:
    grads, out = _gradients(num_tasks, dtype), [torch.empty(CHUNK, dtype=dtype)]
    weights = torch.rand(num_tasks, dtype=torch.float64)
    return Call(lambda: mtl.combine(grads, weights, out=out), [*(row[0] for row in grads), *out], CHUNK)


def _gram_combine(num_tasks: int, dtype: torch.dtype) -> Call:
    grads, out = _gradients(num_tasks, dtype), [torch.empty(CHUNK, dtype=dtype)]
    weights = torch.rand(num_tasks, dtype=torch.float64)
    return Call(lambda: gram_combine_(out, grads, weights), [*(row[0] for row in grads), *out], CHUNK)


def _combine_per_channel(num_tasks: int, dtype: torch.dtype) -> Call:
    grads, out = _gradients(num_tasks, dtype, (64, 64, 3, 3)), [torch.empty((64, 64, 3, 3), dtype=dtype)]
    weights = [torch.rand(64, num_tasks, dtype=torch.float64)]
    return Call(lambda: mtl.combine(grads, weights, out=out), [*(row[0] for row in grads), *out], 64 * 64 * 9)


def _mix(num_tasks: int, dtype: torch.dtype) -> Call:
    grads, coefficients = _gradients(num_tasks, dtype), torch.rand(num_tasks, num_tasks, dtype=torch.float64)
    return Call(lambda: mtl.mix(grads, coefficients), [row[0] for row in grads], CHUNK)


def _priority_combine(num_tasks: int, dtype: torch.dtype) -> Call:
    shape = (128, 512, 1, 1)  # a convolution of ResNet-50
    grads, out, top = _gradients(num_tasks, dtype, shape), [torch.empty(shape, dtype=dtype)], [torch.arange(128) % num_tasks]

    def call() -> object:
        return mtl.priority_combine(grads, top, skip_degenerate=False, out=out)

    return Call(call, [*(row[0] for row in grads), *out], out[0].numel())


def _flat_gram(num_tasks: int, dtype: torch.dtype) -> Call:
    rows = _gradients(max(num_tasks // 2 * 2, 2), dtype)  # of both operands together
    half = len(rows) // 2
    return Call(lambda: mtl.flat_gram(rows[:half], rows[half:]), [row[0] for row in rows], CHUNK)


def _perturb(num_tasks: int, dtype: torch.dtype) -> Call:
    (params,), (grads,), out = *_gradients(2, dtype), [torch.empty(CHUNK, dtype=dtype)]
    radii = torch.ones(1, dtype=torch.float64)
    return Call(lambda: torch.ops.mtlkernels.perturb_(out, [params], [grads], radii, True), [params, grads, *out], CHUNK)


def _graddrop(num_tasks: int, dtype: torch.dtype) -> Call:
    grads, out = _gradients(num_tasks, dtype), [torch.empty(CHUNK, dtype=dtype)]
    leak, seed = torch.zeros(num_tasks, dtype=torch.float64), torch.tensor([3])
    flat = [row[0] for row in grads]
    return Call(lambda: torch.ops.mtlkernels.graddrop_(out, flat, leak, None, seed, [0]), [*flat, *out], CHUNK)


def _gradient_dropout(mode: str) -> Callable[[int, torch.dtype], Call]:
    def call(num_tasks: int, dtype: torch.dtype) -> Call:
        (grads,), out = _gradients(1, dtype), [torch.empty(CHUNK, dtype=dtype)]
        p, seed = torch.tensor(0.1, dtype=torch.float64), torch.tensor([3])
        return Call(lambda: torch.ops.mtlkernels.gradient_dropout_(out, grads, p, mode, seed, [0]), [*grads, *out], CHUNK)

    return call


def _trimmed_mean(num_tasks: int, dtype: torch.dtype, trim: int) -> Call:
    grads, out = _gradients(num_tasks, dtype), [torch.empty(CHUNK, dtype=dtype)]
    flat, trim = [row[0] for row in grads], min(trim, (num_tasks - 1) // 2)
    return Call(lambda: torch.ops.mtlkernels.trimmed_mean_(out, flat, num_tasks, trim, None), [*flat, *out], CHUNK)


def _combine_sgd(num_tasks: int, dtype: torch.dtype) -> Call:
    grads, (param, momentum) = _gradients(num_tasks, dtype), (row[0] for row in _gradients(2, dtype))
    weights, lr = torch.rand(num_tasks, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)

    def call() -> object:
        return combine_sgd_([param], [momentum], grads, weights, lr, momentum=0.9)

    return Call(call, [*(row[0] for row in grads), param, momentum], CHUNK)


def _combine_adam(num_tasks: int, dtype: torch.dtype) -> Call:
    grads, (param, first, second) = _gradients(num_tasks, dtype), (row[0] for row in _gradients(3, dtype))
    weights, lr = torch.rand(num_tasks, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)

    def call() -> object:
        states = [param], [first], [second.abs_()], []
        return combine_adam_(*states, [torch.tensor(3.0)], grads, weights, lr, weight_decay=0.1, decoupled=True)

    return Call(call, [*(row[0] for row in grads), param, first, second], CHUNK)


def _memory_combine(num_tasks: int, dtype: torch.dtype) -> Call:
    grads, out = _gradients(num_tasks, dtype), [torch.empty(CHUNK, dtype=dtype)]
    memory = [[t.to(memory_dtype(dtype)) for t in row] for row in _gradients(num_tasks, torch.float64)]
    factors = torch.rand(3, num_tasks, dtype=torch.float64)
    tensors = [row[0] for row in [*grads, *memory]]
    return Call(lambda: memory_combine_(out, memory, grads, factors), [*tensors, *out], CHUNK)


def _excess_risk(num_tasks: int, dtype: torch.dtype) -> Call:
    grads, factor = _gradients(num_tasks, dtype), torch.ones(num_tasks, dtype=torch.float64)
    memory = [[t.square().to(memory_dtype(dtype)) for t in row] for row in _gradients(num_tasks, torch.float64)]
    return Call(lambda: excess_risk(memory, grads, factor, 1e-7), [row[0] for row in [*grads, *memory]], CHUNK)


OPS = {
    "gram": _gram,
    "cross_gram": _cross_gram,
    "gram per channel": _gram_per_channel,
    "combine": _combine,
    "gram_combine_": _gram_combine,
    "combine per channel": _combine_per_channel,
    "mix": _mix,
    "priority_combine": _priority_combine,
    "flat_gram": _flat_gram,
    "perturb_": _perturb,
    "graddrop": _graddrop,
    "gradient_dropout": _gradient_dropout("gaussian"),
    "gradient_dropout bernoulli": _gradient_dropout("bernoulli"),
    "trimmed_mean": lambda num_tasks, dtype: _trimmed_mean(num_tasks, dtype, 1),
    "trimmed_mean by 3": lambda num_tasks, dtype: _trimmed_mean(num_tasks, dtype, 3),
    "median": lambda num_tasks, dtype: _trimmed_mean(num_tasks, dtype, num_tasks),
    "memory_combine_": _memory_combine,
    "excess_risk": _excess_risk,
    "combine_sgd_": _combine_sgd,
    "combine_adam_": _combine_adam,
}
"""Op on gradients -> its representative call."""


def _of_gram(op: Callable[[Tensor], object]) -> Callable[[int, torch.dtype], Call]:
    """The call of an op on a Gram matrix, which has no gradients to read."""

    def call(num_tasks: int, dtype: torch.dtype) -> Call:
        rows = torch.randn(num_tasks, 2 * num_tasks, dtype=dtype, generator=torch.Generator().manual_seed(num_tasks))
        return Call(lambda: op(rows @ rows.T), [], 0)

    return call


_ops = torch.ops.mtlkernels
OPS_ON_GRAM = {
    "cosine": _of_gram(_ops.cosine),
    "magnitude_similarity": _of_gram(_ops.magnitude_similarity),
    "conflict_rate": _of_gram(_ops.conflict_rate),
    "condition_number": _of_gram(_ops.condition_number),
    "projection_coefficients": _of_gram(
        lambda g: _ops.projection_coefficients(g.double(), torch.arange(len(g)).repeat(len(g), 1), True)
    ),
    "pcgrad_weights": _of_gram(lambda g: _ops.pcgrad_weights(g.double(), torch.tensor(0))),
    "mgda_weights": _of_gram(lambda g: _ops.mgda_weights(g.double(), None)),
    "cagrad_weights": _of_gram(lambda g: _ops.cagrad_weights(g.double(), None, 0.4)),
    "conicgrad_weights": _of_gram(lambda g: _ops.conicgrad_weights(g.double(), None, 0.9)),
    "fairgrad_weights": _of_gram(lambda g: _ops.fairgrad_weights(g.double(), None, 2.0)),
    "gradvac_weights": _of_gram(lambda g: _ops.gradvac_weights(g.double(), 0 * g.double(), None, torch.tensor(0), 0.5, 0.0)),
    "config_weights": _of_gram(lambda g: _ops.config_weights(g.double(), None, None, 1e-14)),
    "imtl_g_weights": _of_gram(lambda g: _ops.imtl_g_weights(g.double(), None, 1e-14)),
    "aligned_mtl_weights (min)": _of_gram(lambda g: _ops.aligned_mtl_weights(g.double(), None, None, 0, 1e-14)),
    "aligned_mtl_weights (median)": _of_gram(lambda g: _ops.aligned_mtl_weights(g.double(), None, None, 1, 1e-14)),
    "aligned_mtl_weights (rmse)": _of_gram(lambda g: _ops.aligned_mtl_weights(g.double(), None, None, 2, 1e-14)),
    "upgrad_weights": _of_gram(lambda g: _ops.upgrad_weights(g.double(), None, None)),
    "dualproj_weights": _of_gram(lambda g: _ops.dualproj_weights(g.double(), None, None)),
    "pcd_weights": _of_gram(lambda g: _ops.pcd_weights(g.double(), None, g.new_zeros(len(g)).double())),
    "connection_strength": _of_gram(lambda g: _ops.connection_strength(g.double().diagonal(), [g], [g.abs()], 1e-5)),
}
"""Op of the K x K stage -> its representative call."""


@dataclass
class Run:
    """A call's launches, of which the one that moves the most bytes is the op's main launch."""

    op: str
    dtype: torch.dtype
    num_tasks: int
    call: Call
    launches: list[Launch]

    @property
    def main(self) -> Launch:
        return max(self.launches, key=lambda launch: launch.report.global_load_bytes + launch.report.global_store_bytes)

    @property
    def sectors_over_ideal(self) -> float:
        """32-byte sectors that the gradients' reads and writes take, over those of their bytes."""
        moved = [launch.report.alloc(t) for t in self.call.streams for launch in self.launches if _touches(launch, t)]
        return 32 * sum(a.load_sectors + a.store_sectors for a in moved) / sum(_bytes(t) for t in self.call.streams)

    @property
    def reads(self) -> float:
        """Times that the gradients' bytes are read or written."""
        moved = [launch.report.alloc(t) for t in self.call.streams for launch in self.launches if _touches(launch, t)]
        return sum(a.load_bytes + a.store_bytes for a in moved) / sum(_bytes(t) for t in self.call.streams)

    @property
    def conflicts(self) -> float:
        """Bank conflicts per wavefront of shared memory."""
        reports = [launch.report for launch in self.launches]
        wavefronts = sum(r.shared_load_wavefronts + r.shared_store_wavefronts for r in reports)
        return sum(r.shared_load_conflicts + r.shared_store_conflicts for r in reports) / max(wavefronts, 1)

    def bounds(self, chip: Chip) -> Bounds:
        """Lower bounds of the main launch on a chip that a grid of such blocks fills."""
        return estimate(self.main.report, chip, pipes=pipes(self.main, chip.arch), sample=True)


def _touches(launch: Launch, tensor: Tensor) -> bool:
    return any(a.base <= tensor.data_ptr() < a.base + a.size for a in launch.report.allocs)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@functools.cache
def run(op: str, dtype: torch.dtype, num_tasks: int) -> Run:
    """Runs one op under ptxsim with all of its checks."""
    call = (OPS | OPS_ON_GRAM)[op](num_tasks, dtype)
    with simulated_cuda() as device:
        call.run()
    if not device.launches:
        raise RuntimeError(f"{op} launched no kernel; is it registered for CUDA?")
    return Run(op, dtype, num_tasks, call, device.launches)


@dataclass
class Compiled:
    """A kernel's machine code and what it takes."""

    name: str
    function: sass.Function
    resources: sass.Resources


def complaints(kernel: Compiled) -> list[str]:
    """What is wrong with a kernel's use of registers and memory: nothing, it is hoped."""
    used = kernel.resources
    found = [f"spills {used.spilled} bytes"] if used.spilled else []
    found += [f"has {used.stack} bytes of stack"] if used.stack else []
    found += ["reads or writes local memory"] if any(i.name in ("LDL", "STL") for i in kernel.function.instructions) else []
    return [f"{kernel.name} {complaint}" for complaint in found]


def compile_library_source(source: Path, arch: str) -> dict[str, Compiled]:
    """Short name -> every kernel of a source of csrc/cuda, compiled for an architecture with the library's flags."""
    functions, resources = sass.compile_source(source, arch, *setup_script()["FLAGS"].get(f"csrc/cuda/{source.name}", []))
    return {sass.short_name(name): Compiled(sass.short_name(name), functions[name], resources[name]) for name in resources}


@functools.cache
def compiled(arch: str) -> dict[str, Compiled]:
    """Short name -> every kernel of the library."""
    sources = sorted((CSRC / "cuda").glob("*.cu"))
    return {name: kernel for source in sources for name, kernel in compile_library_source(source, arch).items()}


@functools.cache
def _assembled(module: "ptxsim.Module", arch: str) -> dict[str, sass.Function]:
    return {module.kernel(name).demangled: f for name, f in sass.assemble(module.ptx, arch).items()}


def pipes(launch: Launch, arch: str) -> dict[str, float]:
    """Work by execution pipe of a launch, counted in the machine code of an architecture."""
    return _function(launch, arch).pipes(launch.report.lines)


def executed(launch: Launch, arch: str, name: str) -> float:
    """Warp instructions of a name that a launch executes."""
    function = _function(launch, arch)
    times = function.executed(launch.report.lines)
    return sum(times[index] * sum(i.name == name for i in function.blocks[index].instructions) for index in times)


def _function(launch: Launch, arch: str) -> sass.Function:
    modules = library().kernels.values()
    module = next(m for m in modules if any(m.kernel(name).demangled == launch.kernel for name in m.names))
    return _assembled(module, arch)[launch.kernel]


@dataclass
class Kernel:
    """A kernel with the runs of the library that launched it."""

    name: str
    launches: list[tuple[Run, Launch]] = field(default_factory=list)

    @property
    def launch(self) -> Launch:
        """The one with the most tasks."""
        return self.launches[-1][1]

    @property
    def ops(self) -> list[str]:
        return list(dict.fromkeys(run.op for run, _ in self.launches))

    @property
    def streams(self) -> bool:
        """Whether it reads gradients, so that it is to keep the memory busy."""
        return any(
            _touches(launch, t) and launch.report.alloc(t).load_bytes for run, launch in self.launches for t in run.call.streams
        )

    def bytes_in_flight(self, chip: Chip) -> float:
        """Bytes of loads under way on one SM at least, with 2 tasks or more where it takes them."""
        some = [launch for run, launch in self.launches if run.num_tasks > 1] or [self.launch]
        return min(bytes_in_flight(chip, compiled(chip.arch)[self.name], launch) for launch in some)

    def waves(self, chip: Chip, elements: int = LARGE_MODEL) -> float:
        """Grid of a model over the blocks that the chip holds at once."""
        run, launch = self.launches[-1]
        return (
            launch.grid[0]
            * elements
            / run.call.elements
            / (resident_blocks(chip, compiled(chip.arch)[self.name], launch) * chip.sms)
        )


def resident_blocks(chip: Chip, kernel: Compiled, launch: Launch) -> int:
    """Blocks of a launch on one SM."""
    threads = launch.block[0] * launch.block[1] * launch.block[2]
    return chip.resident_blocks(threads, kernel.resources.registers, kernel.resources.shared + launch.shared_bytes)


def bytes_in_flight(chip: Chip, kernel: Compiled, launch: Launch) -> float:
    """Bytes of loads under way on one SM: resident warps x 32 threads x bytes that a thread has under way in its main loop.

    Of asynchronous copies a warp has under way the groups that its waits leave pending and the one that it commits next; their
    size is what it copied in the launch over the groups that it committed.
    """
    warps = launch.block[0] * launch.block[1] * launch.block[2] // 32
    of_warp: float = 32 * kernel.function.bytes_in_flight
    if kernel.function.asynchronous:
        groups = executed(launch, chip.arch, "LDGDEPBAR")
        of_warp = (kernel.function.pending_groups + 1) * launch.report.cp_async_bytes / groups
    return resident_blocks(chip, kernel, launch) * warps * of_warp


def bytes_in_flight_bar(chip: Chip) -> float:
    """Bytes that must be under way on one SM for the chip's bandwidth: bandwidth x latency / SMs."""
    return chip.dram_gbs * 1e9 * LATENCY_SECONDS / chip.sms


def catalogue() -> dict[str, Kernel]:
    """Short name -> every kernel that the ops launch, with any dtype and class of the number of tasks."""
    runs = [run(op, dtype, num_tasks) for op in OPS for dtype in DTYPES for num_tasks in NUM_TASKS]
    runs += [run(op, dtype, 8) for op in OPS_ON_GRAM for dtype in (torch.float32, torch.float64)]
    found: dict[str, Kernel] = {}
    for done in runs:
        for launch in done.launches:
            name = sass.short_name_of(launch.kernel)
            found.setdefault(name, Kernel(name)).launches.append((done, launch))
    return found
