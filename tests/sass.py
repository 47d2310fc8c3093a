"""Machine code: what ptxas made of a kernel, its loops, what it loads at once, and how often each instruction runs."""

import contextlib
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import ptxsim
import pytest
from device import ROOT
from ptxsim.module import nvcc

BUILD = ROOT / "build/testing/machine-code"
NO_NVDISASM = "nvdisasm is missing: it comes with the CUDA toolkit and with Triton's wheel; set NVDISASM to it"


@functools.cache
def find_nvdisasm() -> str | None:
    """nvdisasm: NVDISASM, the PATH, the CUDA toolkit, or Triton's wheel, which ships one."""
    toolkit = Path(os.path.realpath(nvcc())).parent
    told = subprocess.run([nvcc(), "--dryrun", "none.cu"], capture_output=True, text=True, check=False).stderr
    top = re.search(r"^#\$ TOP=(.*)$", told, re.MULTILINE)
    folders = [toolkit, *([Path(top[1]) / "bin"] if top else [])]
    folders += [Path(path) / "triton/backends/nvidia/bin" for path in sys.path if path]
    candidates = [os.environ.get("NVDISASM"), shutil.which("nvdisasm"), *(str(folder / "nvdisasm") for folder in folders)]
    return next((path for path in candidates if path and os.access(path, os.X_OK)), None)


def require_nvdisasm() -> str:
    """The disassembler; without one a test is skipped, or fails under MTLKERNELS_REQUIRE_C=1."""
    found = find_nvdisasm()
    if found is None:
        (pytest.fail if os.environ.get("MTLKERNELS_REQUIRE_C") == "1" else pytest.skip)(NO_NVDISASM)
    return found


@dataclass(frozen=True)
class Instruction:
    """One instruction. `line` is that of the PTX it was made from, 0 where that is not known."""

    opcode: str
    operands: tuple[str, ...]
    predicate: str
    line: int

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def access_bytes(self) -> int:
        """Bytes a thread moves with a load or store."""
        widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
        return next((widths[part] for part in self.opcode.split(".") if part in widths), 4)

    @property
    def registers(self) -> set[int]:
        """Every register that it reads or writes."""
        found: set[int] = set()
        for position, operand in enumerate(self.operands):
            for match in re.finditer(r"(?<![A-Z])R(\d+)(\.64)?", operand):
                first = int(match[1])
                width = 2 if match[2] else 1 if "[" in operand else self._operand_registers(position)
                found.update(range(first, first + width))
        return found

    def _operand_registers(self, position: int) -> int:
        if self.name == "HMMA":
            return ((4, 4, 2, 4) if ".16816" in self.opcode else (4, 2, 1, 4))[min(position, 3)]
        if self.name == "DMMA":
            return (4, 2, 2, 4)[min(position, 3)]
        if self.name in ("LDG", "LDS", "STG", "STS", "LDL", "STL"):
            return max(1, self.access_bytes // 4)
        wide = self.name in ("DFMA", "DADD", "DMUL", "DSETP", "FFMA2", "FADD2", "FMUL2") or "F64" in self.opcode
        return 2 if wide or ".WIDE" in self.opcode else 1

    @property
    def one_to_one(self) -> bool:
        """Whether ptxas makes one such instruction of one of PTX, and none of its own; `!PT` never runs."""
        memory, arithmetic = (
            ("LDG", "STG", "LDGSTS", "LDS", "STS"),
            ("FFMA", "FADD", "FMUL", "DFMA", "DADD", "DMUL", "HMMA", "DMMA"),
        )
        return self.name in (*memory, *arithmetic, "SHFL", "BAR") and self.predicate != "!PT"

    @property
    def loads_global(self) -> bool:
        return self.name in ("LDG", "LDGSTS")


@dataclass
class Block:
    """A basic block, and the blocks that may follow it."""

    instructions: list[Instruction]
    next: list[int]

    @property
    def load_bytes(self) -> int:
        return sum(i.access_bytes for i in self.instructions if i.loads_global)


@dataclass
class Function:
    """The machine code of one kernel."""

    name: str
    blocks: list[Block]

    @property
    def instructions(self) -> list[Instruction]:
        return [i for block in self.blocks for i in block.instructions]

    @functools.cached_property
    def loops(self) -> list[tuple[int, frozenset[int]]]:
        """(head, body) of the natural loops."""
        dominators = _dominators(self.blocks)
        before: list[list[int]] = [[] for _ in self.blocks]
        for index, block in enumerate(self.blocks):
            for following in block.next:
                before[following].append(index)
        bodies: dict[int, set[int]] = {}
        for tail, block in enumerate(self.blocks):
            for head in block.next:
                if head in dominators[tail]:
                    body, todo = bodies.setdefault(head, {head}), [tail]
                    while todo:
                        if (index := todo.pop()) not in body:
                            body.add(index)
                            todo += before[index]
        return [(head, frozenset(body)) for head, body in bodies.items()]

    @functools.cached_property
    def main_loop(self) -> list[Instruction]:
        """The longest-loading path once round the innermost loop with the most 128-bit global loads (then bytes); empty without
        a loop that loads."""
        heads = {head for head, _ in self.loops}
        innermost = [(head, body) for head, body in self.loops if not (heads - {head}) & body]
        paths = [_heaviest_path(self.blocks, head, body) for head, body in innermost]
        return max(paths, key=lambda path: (count_wide_loads(path), _load_bytes(path)), default=[])

    @property
    def asynchronous(self) -> bool:
        """Whether the main loop copies to shared memory without waiting."""
        return any(i.name == "LDGSTS" for i in self.main_loop)

    @property
    def pending_groups(self) -> int:
        """Groups of asynchronous copies that the waits inside loops leave under way."""
        inside = {index for _, body in self.loops for index in body}
        waits = [i.operands for index in inside for i in self.blocks[index].instructions if i.opcode == "DEPBAR.LE"]
        return min((int(count, 16) for barrier, count in waits if barrier == "SB0"), default=0)

    @property
    def bytes_in_flight(self) -> int:
        """The most bytes of global loads to registers that a thread has under way at once in its main loop.

        Walks the loop twice. A load is under way until an instruction mentions one of its registers; loads return in order, so
        that those issued earlier are back by then too.
        """
        under_way: list[tuple[set[int], int]] = []
        most = 0
        for i in self.main_loop * 2:
            done = [n for n, (registers, _) in enumerate(under_way) if registers & i.registers]
            if done:
                under_way = under_way[done[-1] + 1 :]
            if i.name == "LDG":
                first = int(re.search(r"R(\d+)", i.operands[0])[1])
                under_way.append((set(range(first, first + max(1, i.access_bytes // 4))), i.access_bytes))
                most = max(most, sum(size for _, size in under_way))
        return most

    def executed(self, lines: dict[int, int]) -> dict[int, float]:
        """Block -> times it runs, from how often a run of its PTX executed each line.

        ptxas copies and hoists instructions, so no single one is to be trusted: a line's executions are shared by its copies,
        and a block runs as often as the median of its instructions. It also makes several of one, save of loads, stores and
        floating-point arithmetic: where a block has any of these, they alone count; elsewhere copies are told by their blocks.
        """
        copies = Counter((i.line, i.name) for i in self.instructions)
        blocks = Counter(key for block in self.blocks for key in {(i.line, i.name) for i in block.instructions})
        result = {}
        for index, block in enumerate(self.blocks):
            exact = [lines.get(i.line, 0) / copies[i.line, i.name] for i in block.instructions if i.one_to_one]
            rough = [lines.get(i.line, 0) / blocks[i.line, i.name] for i in block.instructions]
            if rough:
                result[index] = median(exact or rough)
        return result

    def pipes(self, lines: dict[int, int]) -> dict[str, float]:
        """Warp instructions by execution pipe of a launch that executed PTX `lines` so often."""
        counts: dict[str, float] = {"issue": 0.0}
        for index, times in self.executed(lines).items():
            for i in self.blocks[index].instructions:
                pipe, amount = work_of(i)
                counts["issue"] += times
                counts[pipe] = counts.get(pipe, 0) + amount * times
        return counts


def count_wide_loads(path: list[Instruction]) -> int:
    return sum(i.loads_global and i.access_bytes == 16 for i in path)


def _load_bytes(path: list[Instruction]) -> int:
    return sum(i.access_bytes for i in path if i.loads_global)


def describe_loads(path: list[Instruction]) -> str:
    """The global loads of a path by width, as "4 x 128 bit"."""
    widths = Counter(8 * i.access_bytes for i in path if i.loads_global)
    return ", ".join(f"{count} x {width} bit" for width, count in sorted(widths.items(), reverse=True))


def work_of(instruction: Instruction) -> tuple[str, int]:
    """The pipe that executes an instruction, by the CUDA programming guide's table of throughput, and the work it is: warp
    instructions, floating-point operations on the tensor cores (`mma`, `dmma`). `none` takes an issue slot alone: the uniform
    data path, control, and memory, whose traffic is counted elsewhere."""
    name, opcode = instruction.name, instruction.opcode
    if name in ("HMMA", "DMMA"):
        return ("mma" if name == "HMMA" else "dmma"), _matrix_operations(opcode)
    if name in ("DFMA", "DADD", "DMUL", "DSETP", "DMNMX"):
        return "fp64", 1
    if name in ("F2F", "F2I", "I2F", "FRND", "MUFU"):
        return ("cvt64" if "64" in opcode else "sfu"), 1
    if name in ("FFMA2", "FADD2", "FMUL2"):  # two of each lane
        return "fp32", 2
    if name in ("FFMA", "FADD", "FMUL", "HFMA2", "HADD2", "HMUL2"):
        return "fp32", 1
    if name == "IMAD":
        return "imad", 1
    if name in _OTHER or name.startswith(("U", "R2U", "LD", "ST", "S2", "BR", "BA", "BS", "BM", "CALL", "RET")):
        return "none", 1
    return "int", 1


def _matrix_operations(opcode: str) -> int:
    """Two for every product, of "HMMA.16816.F32", "HMMA.1688.F32.BF16", "DMMA.884" or "DMMA.8x8x4"."""
    shape = re.search(r"\.(\d+)x(\d+)x(\d+)|\.(16|8)(8)(16|8|4)\b", opcode)
    assert shape is not None, f"{opcode}: unknown shape"
    rows, columns, depth = (int(size) for size in shape.groups() if size)
    return 2 * rows * columns * depth


_OTHER = {"EXIT", "NOP", "DEPBAR", "WARPSYNC", "ATOM", "ATOMG", "ATOMS", "RED", "SHFL", "VOTE", "CS2R", "YIELD", "MEMBAR"}
_OTHER |= {"ERRBAR", "CCTL", "NANOSLEEP", "R2P", "P2R", "KILL", "JMP", "ACQBULK", "SYNCS", "ELECT", "WARPGROUP"}


def _dominators(blocks: list[Block]) -> list[set[int]]:
    before: list[list[int]] = [[] for _ in blocks]
    for index, block in enumerate(blocks):
        for following in block.next:
            before[following].append(index)
    everything = set(range(len(blocks)))
    result = [{0}, *(set(everything) for _ in blocks[1:])]
    changed = True
    while changed:
        changed = False
        for index in range(1, len(blocks)):
            common = set.intersection(*(result[b] for b in before[index])) if before[index] else set()
            if common | {index} != result[index]:
                result[index] = common | {index}
                changed = True
    return result


def _heaviest_path(blocks: list[Block], head: int, body: frozenset[int]) -> list[Instruction]:
    """Once round a loop without inner loops, along the blocks that load the most bytes (then the most instructions)."""

    @functools.cache
    def best(index: int) -> tuple[int, int, tuple[int, ...]]:
        following = [best(n) for n in blocks[index].next if n in body and n != head]
        load, size, path = max(following, default=(0, 0, ()))
        return blocks[index].load_bytes + load, len(blocks[index].instructions) + size, (index, *path)

    return [i for index in best(head)[2] for i in blocks[index].instructions]


_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", re.ASCII)
_LINE = re.compile(r'File ".nv_debug_ptx_txt[^"]*", line (\d+)')


def _parse(text: str) -> dict[str, Function]:
    """Mangled name -> machine code of every kernel that nvdisasm tells of."""
    return {name: Function(name, _blocks(lines)) for name, lines in _sections(text)}


def _sections(text: str) -> Iterator[tuple[str, list[str]]]:
    parts = re.split(r"^\.text\.(\S+):$", text, flags=re.MULTILINE)
    for name, body in zip(parts[1::2], parts[2::2], strict=True):
        yield name, body.splitlines()


def _blocks(lines: list[str]) -> list[Block]:
    groups: list[list[Instruction]] = [[]]
    labels: dict[str, int] = {}
    source = 0
    for line in lines:
        if line.startswith("//-----") or line.lstrip().startswith(".section"):
            break
        if label := re.match(r"^(\.L\w+):", line):
            if groups[-1]:
                groups.append([])
            labels[label[1]] = len(groups) - 1
        elif told := _LINE.search(line):
            source = int(told[1])
        elif match := _INSTRUCTION.match(line):
            operands = tuple(part.strip() for part in match[3].split(","))
            groups[-1].append(Instruction(match[2], operands, match[1] or "", source))
            if match[2].split(".")[0] in ("BRA", "EXIT", "RET", "BRX", "JMP"):
                groups.append([])
    blocks = []
    for index, group in enumerate(groups):
        following = [index + 1] if index + 1 < len(groups) else []
        last = group[-1] if group else None
        if last is not None and last.name in ("BRA", "EXIT", "RET", "BRX", "JMP"):
            always = not last.predicate and (last.name != "BRA" or len(last.operands) == 1)
            target = re.search(r"\((\.L\w+)\)", last.operands[-1]) if last.name == "BRA" else None
            following = ([] if always else following) + ([labels[target[1]]] if target else [])
        blocks.append(Block(group, following))
    return blocks


def assemble(ptx: str, arch: str) -> dict[str, Function]:
    """Machine code of PTX text for an architecture, with the PTX line of every instruction. PTX that names a newer target is
    taken as if it named this one; ptxas says where it uses more than there is."""
    ptx = re.sub(r"^\.target\s+sm_\d+\w*", f".target {arch}", ptx, count=1, flags=re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernels.ptx"
        source.write_text(ptx)
        text, _ = _compile(source, ptx.encode(), f"-arch={arch}", "-Xptxas", "-lineinfo")
        return _parse(text)


@dataclass(frozen=True)
class Resources:
    """What ptxas says a kernel takes: registers of a thread, static shared bytes, stack and spilled bytes."""

    registers: int
    shared: int
    stack: int
    spilled: int


def parse_resources(told: str) -> dict[str, Resources]:
    """Mangled name -> resources, from what ``ptxas -v`` prints."""
    found = {}
    starts = [*re.finditer(r"Compiling entry function '([^']+)'", told)]
    ends = [*(match.start() for match in starts[1:]), len(told)]
    for match, end in zip(starts, ends, strict=True):
        text = told[match.end() : end]

        def number(pattern: str, text: str = text) -> int:
            return sum(int(value) for value in re.findall(pattern, text))

        used = number(r"Used (\d+) registers"), number(r"(\d+) bytes smem"), number(r"(\d+) bytes stack frame")
        found[match[1]] = Resources(*used, number(r"(\d+) bytes spill"))
    return found


def compile_source(source: Path, arch: str, *flags: str) -> tuple[dict[str, Function], dict[str, Resources]]:
    """Machine code and resources of every kernel of a .cu file of csrc/cuda, compiled as the library is."""
    included = [*source.parent.glob("*.cu*"), *(source.parent.parent / "common").glob("*.h")]
    text, told = _compile(
        source, b"".join(path.read_bytes() for path in sorted(included)), f"-arch={arch}", "-Xptxas", "-v", *flags
    )
    return _parse(text), parse_resources(told)


def _compile(source: Path, content: bytes, *flags: str) -> tuple[str, str]:
    """What nvdisasm and nvcc say of a source, whose `content` with what it includes is given. Kept under build/testing, since
    several processes ask for the same."""
    command = [nvcc(), "-cubin", "-std=c++17", "-O3", *flags]
    digest = hashlib.sha256(" ".join([nvcc_version(), source.name, *command]).encode() + content).hexdigest()[:16]
    kept = BUILD / digest
    if not kept.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            cubin, new = Path(folder) / "kernels.cubin", Path(folder) / "new"
            told = subprocess.run([*command, "-o", str(cubin), str(source)], capture_output=True, text=True, check=False)
            assert told.returncode == 0, told.stderr
            text = subprocess.run(
                [require_nvdisasm(), "-gp", "-c", str(cubin)], capture_output=True, text=True, check=True
            ).stdout
            new.mkdir()
            (new / "machine-code").write_text(text)
            (new / "told").write_text(told.stderr)
            with contextlib.suppress(OSError):  # another process was faster
                new.rename(kept)
    return (kept / "machine-code").read_text(), (kept / "told").read_text()


@functools.cache
def nvcc_version() -> str:
    """As "nvcc 13.0.88"."""
    told = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return f"nvcc {re.search(r'V([0-9.]+)', told)[1]}"


def short_name(mangled: str) -> str:
    """Of a kernel's symbol, 'combine<float,2>'."""
    (shown,) = ptxsim.module._demangle([mangled])
    return short_name_of(shown)


def short_name_of(demangled: str) -> str:
    """'void mtlkernels::combine<float, 2>(mtlkernels::TensorTable)' -> 'combine<float,2>'."""
    return ptxsim.module._short(demangled).replace("mtlkernels::", "")
