"""What the CPU kernels cost, counted by valgrind: instructions an element and task.

Counts do not depend on what else the machine does, so this cannot flake, and it runs without torch in seconds. The bounds are
1.5 times what GCC 12 makes of the sources for AVX2, which is what valgrind knows: another compiler passes; a lost vector path
or a second pass does not. ``python tests/test_cost.py`` prints the counts.
"""

import subprocess
import tempfile
from pathlib import Path

import pytest
from device import setup_script
from traffic import ROOT, _compiler, _parse, missing

SLACK = 1.5
NUMEL = 4_100  # with a tail
COUNTS: dict[tuple[str, str], dict[int, float]] = {
    ("gram", "float32"): {2: 0.89, 3: 0.88, 8: 3.17, 16: 5.0, 40: 11.03},
    ("gram", "bfloat16"): {2: 1.47, 3: 1.58, 8: 4.01, 16: 4.62, 40: 10.72},
    ("combine", "float32"): {2: 2.35, 3: 1.77, 8: 1.49, 16: 1.58, 40: 1.55},
    ("combine", "bfloat16"): {2: 7.56, 3: 6.56, 8: 3.46, 16: 2.87, 40: 2.5},
}
"""Instructions an element and task by (op, dtype) and number of tasks."""


def instructions(folder: Path, isa: str = "avx2", repeats: int = 1) -> dict[tuple[str, str, int], float]:
    """Counted for kernels built for an instruction set with the flags of setup.py, each called ``repeats`` times."""
    setup = setup_script()
    sources = [ROOT / "csrc/testing/cost.cpp", *(ROOT / f"csrc/cpu/{name}.cpp" for name in ("gram", "combine", "scratch"))]
    flags = [*setup["COMMON_FLAGS"], *setup["INSTRUCTION_SETS"][isa], f"-DMTL_ISA={isa}", "-w"]
    program, out = folder / f"cost_{isa}", folder / f"{isa}_{repeats}"
    if not program.exists():
        # Bound at the start: the first call counts no look-up of functions.
        subprocess.run([_compiler(), *flags, *map(str, sources), "-Wl,-z,now", "-o", str(program)], check=True)
    out.mkdir()
    command = ["valgrind", "--quiet", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}/counts"]
    subprocess.run([*command, str(program), str(NUMEL), str(repeats)], check=True, capture_output=True)
    counted = dict(_parse(path.read_text()) for path in out.iterdir() if path.name != "counts")
    result = {}
    for label, events in counted.items():
        op, dtype, num_tasks = label.split()
        result[op, dtype, int(num_tasks)] = events["Ir"] / (NUMEL * int(num_tasks))
    return result


def over(counted: dict[tuple[str, str, int], float]) -> dict[tuple[str, str, int], float]:
    """What costs more than its bound, in units of the bound."""
    shares = {(op, dtype, k): n / (SLACK * COUNTS[op, dtype][k]) for (op, dtype, k), n in counted.items()}
    return {case: share for case, share in shares.items() if share > 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := missing():
        pytest.skip(reason)
    return tmp_path_factory.mktemp("cost")


def test_kernels_take_few_instructions(folder: Path) -> None:
    counted = instructions(folder)
    assert len(counted) == sum(map(len, COUNTS.values()))
    assert over(counted) == {}


def test_a_second_pass_is_seen(folder: Path) -> None:
    counted = instructions(folder, repeats=2)
    assert set(over(counted)) == set(counted)


def test_a_lost_vector_path_is_seen(folder: Path) -> None:
    counted = instructions(folder, isa="baseline")  # vectors of half the size, no conversion of 16-bit numbers
    assert set(over(counted)) == set(counted)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        for case, number in instructions(Path(scratch)).items():
            print(*case, f"{number:.2f}")
