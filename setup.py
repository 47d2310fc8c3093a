"""Builds the compiled library with ninja: C++ sources as they are, CPU kernels once per instruction set.

The library uses torch's stable ABI only, so one build serves every torch >= 2.11 and Python >= 3.10, and a CPU-only torch
suffices to build it. Without a C++ compiler the package installs without it, and ``python -m mtlkernels info`` says so.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
TORCH_FLOOR = "0x020b000000000000"  # 2.11, the oldest torch the library loads in

# Instruction set -> flags. The name is the namespace its kernels are compiled into.
INSTRUCTION_SETS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["avx512"] = [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mavx2",
        "-mfma",
        "-mf16c",
        "-mprefer-vector-width=512",
    ]

COMMON_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror=return-type", "-DNDEBUG"]
# The K x K solvers must give the device's results: no contraction of a * b + c, which nvcc is told to leave alone, too.
FLAGS = {"csrc/bindings/kxk.cpp": ["-ffp-contract=off"]}


def find_compiler() -> str | None:
    """The C++ compiler: CXX, or the first of c++, g++, clang++ on the PATH."""
    asked = os.environ.get("CXX")
    if asked:
        if shutil.which(asked.split()[0]) is None:
            sys.exit(f"CXX is {asked!r}, which is not on the PATH; unset CXX or install that compiler.")
        return asked
    return next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)


def ninja_program() -> str:
    """The ninja executable: of the Python package where it is installed, else from the PATH."""
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        found = shutil.which("ninja")
        return found or sys.exit("ninja is missing; run `pip install ninja`.")


def quote(path: Path | str) -> str:
    """A path as ninja wants it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaFile:
    """The text of one build.ninja."""

    def __init__(self, compiler: str, torch_root: Path) -> None:
        # No -Wl,-rpath: torch is loaded before the library, and its own copy must be the one that is used.
        self.lines = [
            f"cxx = {compiler}",
            f"common = {' '.join(COMMON_FLAGS)}",
            f"torch = -DTORCH_STABLE_ONLY -DTORCH_TARGET_VERSION={TORCH_FLOOR} -isystem {quote(torch_root / 'include')}",
            f"link = -L{quote(torch_root / 'lib')} -ltorch_cpu -Wl,--no-undefined -Wl,--strip-all",
            "rule compile",
            "  command = $cxx $common $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = $out",
            "rule link",
            "  command = $cxx -shared $in $link -o $out",
            "  description = $out",
        ]
        self.objects: list[str] = []

    def compile(self, source: Path, name: str, flags: str) -> None:
        self.lines += [f"build {name}: compile {quote(source)}", f"  flags = {flags}"]
        self.objects.append(name)

    def link(self, target: Path) -> None:
        self.lines += [f"build {quote(target)}: link {' '.join(self.objects)}", f"default {quote(target)}"]


class NinjaBuild(build_ext):
    """Builds ``mtlkernels._C`` from csrc/bindings, csrc/common and, per instruction set, csrc/cpu."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        note = {}
        compiler = find_compiler()
        if compiler is None:
            note["cpu"] = "not built: there was no C++ compiler; install g++ or clang++ and reinstall mtlkernels from source"
            print(f"warning: mtlkernels._C {note['cpu']}", file=sys.stderr)
        else:
            self.run_ninja(compiler, target)
        (target.parent / "_build.json").write_text(json.dumps(note) + "\n")

    def run_ninja(self, compiler: str, target: Path) -> None:
        try:
            import torch
        except ImportError:
            sys.exit("building mtlkernels needs torch >= 2.11; install it first and use `pip install --no-build-isolation .`.")
        ninja = NinjaFile(compiler, Path(torch.__file__).parent)
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for source in sorted((ROOT / "csrc").glob("bindings/*.cpp")) + sorted((ROOT / "csrc").glob("common/*.cpp")):
            flags = " ".join(["$torch", *FLAGS.get(source.relative_to(ROOT).as_posix(), [])])
            ninja.compile(source.resolve(), f"{source.parent.name}_{source.stem}.o", flags)
        for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
            # capability.cpp picks the instruction set, so it is itself built for the baseline alone.
            sets = INSTRUCTION_SETS if '"vector.h"' in source.read_text() else {"baseline": []}
            for name, flags in sets.items():
                # GCC's own AVX-512 header starts registers from themselves, which its warning takes for a mistake.
                options = [f"-DMTL_ISA={name}", *flags, "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
                ninja.compile(source.resolve(), f"cpu_{source.stem}_{name}.o", " ".join(options))
        ninja.link(target)
        (folder / "build.ninja").write_text("\n".join(ninja.lines) + "\n")
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run([ninja_program(), "-C", str(folder), "-j", jobs], check=True)

    def get_outputs(self) -> list[str]:
        # Without a compiler there is a note and no library.
        return [output for output in super().get_outputs() if Path(output).exists()]

    def copy_extensions_to_source(self) -> None:
        """In-place and editable builds: the library and the note go beside the sources, where the package looks for them."""
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(ext.name))
            for file in (built, built.parent / "_build.json"):
                if file.exists():
                    shutil.copyfile(file, ROOT / "mtlkernels" / file.name)


setup(
    ext_modules=[Extension("mtlkernels._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": NinjaBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
