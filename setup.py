"""Builds the compiled library with ninja: C++ sources as they are, CPU kernels once per instruction set.

The libraries use torch's stable ABI only, so one build serves every torch >= 2.11 and Python >= 3.10, and a CPU-only torch
suffices to build them. ``_C`` holds the CPU kernels; ``_C_cuda`` the CUDA kernels, built where there is an nvcc. Without a C++
compiler the package installs without either, and ``python -m mtlkernels info`` says so.

Environment: MTLKERNELS_CUDA=auto (where there is an nvcc), 1 (an error where there is none) or 0; CUDACXX, CUDA_HOME: which
nvcc; TORCH_CUDA_ARCH_LIST: architectures, "8.0 9.0 10.0 12.0+PTX" unless set; CXX, MAX_JOBS.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, __version__, setup
from setuptools.command.build_ext import build_ext

if int(__version__.split(".")[0]) < 77:
    sys.exit(f"setuptools is {__version__}; building mtlkernels needs 77 or newer: pip install -U setuptools.")

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
    INSTRUCTION_SETS["avx512_bf16"] = [*INSTRUCTION_SETS["avx512"], "-mavx512bf16"]

COMMON_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror=return-type", "-DNDEBUG"]
# No contraction of a * b + c where bits are the same on every device, or torch's.
FLAGS = {
    "csrc/bindings/kxk_cpu.cpp": ["-ffp-contract=off"],
    "csrc/cuda/kxk.cu": ["-fmad=false"],
    "csrc/cpu/graddrop.cpp": ["-ffp-contract=off"],
    "csrc/cpu/finish.cpp": ["-ffp-contract=off"],
    "csrc/cuda/graddrop.cu": ["-fmad=false"],
    "csrc/cpu/gradient_dropout.cpp": ["-ffp-contract=off"],
    "csrc/cuda/gradient_dropout.cu": ["-fmad=false"],
}

CUDA_ARCHITECTURES = "8.0 9.0 10.0 12.0+PTX"
# What the CUDA binding takes from libtorch_cuda.so, which a CPU-only torch does not have.
TORCH_CUDA_SYMBOLS = ["aoti_torch_get_current_cuda_stream"]


def find_compiler() -> str | None:
    """The C++ compiler: CXX, or the first of c++, g++, clang++ on the PATH."""
    asked = os.environ.get("CXX")
    if asked:
        if shutil.which(asked.split()[0]) is None:
            sys.exit(f"CXX is {asked!r}, which is not on the PATH; unset CXX or install that compiler.")
        return asked
    return next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)


def find_nvcc() -> str | None:
    """The CUDA compiler that MTLKERNELS_CUDA asks for; None where CUDA is off or absent and not required."""
    wanted = os.environ.get("MTLKERNELS_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"MTLKERNELS_CUDA is {wanted!r}; set it to auto, 0 or 1.")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    candidates = [os.environ.get("CUDACXX"), home and f"{home}/bin/nvcc", "nvcc", "/usr/local/cuda/bin/nvcc"]
    found = next((path for name in candidates if name and (path := shutil.which(name))), None)
    if found is None and wanted == "1":
        sys.exit("MTLKERNELS_CUDA=1, but there is no nvcc; install the CUDA toolkit (12.1 or newer) or set CUDA_HOME.")
    return found


def toolkit_root(nvcc: str) -> Path:
    """The toolkit that an nvcc belongs to. It is asked: the one on the PATH may be a wrapper that lies elsewhere."""
    told = subprocess.run([nvcc, "--dryrun", "none.cu"], capture_output=True, text=True, check=False).stderr
    top = re.search(r"^#\$ TOP=(.*)$", told, re.MULTILINE)
    if top is None:
        sys.exit(f"{nvcc} --dryrun does not tell its toolkit; set CUDA_HOME to a complete CUDA toolkit.")
    return Path(top[1]).resolve()


def architecture_flags() -> str:
    """nvcc's flags for TORCH_CUDA_ARCH_LIST, in torch's notation: numbers, +PTX for forward compatibility."""
    flags = []
    for entry in re.split(r"[\s;,]+", os.environ.get("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES).strip()):
        match = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", entry)
        if match is None:
            sys.exit(f"TORCH_CUDA_ARCH_LIST has {entry!r}; name architectures as in {CUDA_ARCHITECTURES!r}.")
        if int(match[1]) < 8:
            sys.exit(f"TORCH_CUDA_ARCH_LIST has {entry!r}; the kernels need 8.0 (Ampere) or newer. Triton's serve older GPUs.")
        number = match[1] + match[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return " ".join(flags)


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
    """The text of one build.ninja, for one library.

    Args:
        compiler: the C++ compiler.
        torch_root: torch's package folder.
        link: what the library is linked with besides torch's CPU library.
    """

    def __init__(self, compiler: str, torch_root: Path, link: str = "") -> None:
        # No -Wl,-rpath: torch is loaded before the library, and its own copy must be the one that is used.
        self.lines = [
            f"cxx = {compiler}",
            f"common = {' '.join(COMMON_FLAGS)}",
            f"torch = -DTORCH_STABLE_ONLY -DTORCH_TARGET_VERSION={TORCH_FLOOR} -isystem {quote(torch_root / 'include')}",
            f"link = -L{quote(torch_root / 'lib')} -ltorch_cpu {link} -Wl,--no-undefined -Wl,--strip-all",
        ]
        self.rule("compile", "$cxx $common $flags -MMD -MF $out.d -c $in -o $out", "depfile = $out.d", "deps = gcc")
        self.rule("link", "$cxx -shared $in $link -o $out")
        self.objects: list[str] = []

    def rule(self, name: str, command: str, *options: str) -> None:
        self.lines += [f"rule {name}", *(f"  {line}" for line in (f"command = {command}", "description = $out", *options))]

    def compile(self, source: Path, name: str, flags: str, rule: str = "compile") -> None:
        self.lines += [f"build {name}: {rule} {quote(source)}", f"  flags = {flags}"]
        self.objects.append(name)

    def link(self, target: Path, needs: str = "") -> None:
        self.lines += [f"build {quote(target)}: link {' '.join(self.objects)}{needs}", f"default {quote(target)}"]

    def run(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text("\n".join(self.lines) + "\n")
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run([ninja_program(), "-C", str(folder), "-j", jobs], check=True)


def build_cpu(compiler: str, torch_root: Path, folder: Path, target: Path) -> None:
    """``_C``: csrc/bindings and, per instruction set, csrc/cpu."""
    ninja = NinjaFile(compiler, torch_root)
    sources = bindings("cpu")
    if not sources:
        sys.exit("csrc is missing; build from a complete source tree, as the repository or the sdist has it.")
    for source in sources:
        flags = " ".join(["$torch", *FLAGS.get(source.relative_to(ROOT).as_posix(), [])])
        ninja.compile(source, f"{source.stem}.o", flags)
    for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
        # capability.cpp picks the instruction set, so it is itself built for the baseline alone.
        sets = INSTRUCTION_SETS if '"vector.h"' in source.read_text() else {"baseline": []}
        for name, flags in sets.items():
            # GCC's own AVX-512 header starts registers from themselves, which its warning takes for a mistake.
            options = [f"-DMTL_ISA={name}", *flags, "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
            options += FLAGS.get(source.relative_to(ROOT).as_posix(), [])
            ninja.compile(source, f"{source.stem}_{name}.o", " ".join(options))
    ninja.link(target)
    ninja.run(folder)


def build_cuda(compiler: str, nvcc: str, torch_root: Path, folder: Path, target: Path) -> None:
    """``_C_cuda``: csrc/cuda by nvcc itself, which needs no CUDA build of torch, and the bindings by the C++ compiler."""
    toolkit = toolkit_root(nvcc)
    libraries = next((path for name in ("lib64", "lib", "targets/x86_64-linux/lib") if (path := toolkit / name).is_dir()), None)
    runtime = None if libraries is None else libraries / "libcudart_static.a"
    if runtime is None or not runtime.exists():
        sys.exit(f"the CUDA toolkit in {toolkit} has no libcudart_static.a; install a complete one, or set MTLKERNELS_CUDA=0.")
    # The library names libtorch_cuda.so as its dependency, so that its symbols are found when a CUDA torch has loaded it.
    # A CPU-only torch lacks the file: a stub of that name takes its place while linking.
    real = torch_root / "lib" / "libtorch_cuda.so"
    stub = folder / "libtorch_cuda.so"
    torch_cuda = real if real.exists() else stub
    ninja = NinjaFile(compiler, torch_root, f"-Wl,--no-as-needed {quote(torch_cuda)} {quote(runtime)} -lrt -ldl -lpthread")
    ninja.rule("nvcc", f"{nvcc} $flags -MMD -MF $out.d -c $in -o $out", "depfile = $out.d", "deps = gcc")
    ninja.rule("stub", "$cxx -shared -fPIC -x c++ $in -Wl,-soname,libtorch_cuda.so -o $out")
    if torch_cuda == stub:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "stub.cpp").write_text("".join(f'extern "C" void {name}() {{}}\n' for name in TORCH_CUDA_SYMBOLS))
        ninja.lines.append(f"build {quote(stub)}: stub stub.cpp")
    device_flags = f"-std=c++17 -O3 {architecture_flags()} -Xcompiler -fPIC,-fvisibility=hidden --threads 0 -DNDEBUG"
    for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        flags = " ".join([device_flags, *FLAGS.get(source.relative_to(ROOT).as_posix(), [])])
        ninja.compile(source, f"{source.stem}.cu.o", flags, rule="nvcc")
    for source in bindings("cuda") + sorted((ROOT / "csrc/common").glob("*.cpp")):
        ninja.compile(source, f"{source.stem}.o", "$torch -DUSE_CUDA")
    ninja.link(target, f" | {quote(stub)}" if torch_cuda == stub else "")
    ninja.run(folder)


def bindings(device: str) -> list[Path]:
    """The sources of csrc/bindings for a device: those with its name at the end, and those that all devices share."""
    sources = sorted((ROOT / "csrc/bindings").glob("*.cpp"))
    return [source for source in sources if source.stem.endswith(f"_{device}") or not source.stem.endswith(("_cpu", "_cuda"))]


class NinjaBuild(build_ext):
    """Builds the libraries that can be built here; ``_build.json`` tells why another is missing."""

    def run(self) -> None:
        self.notes: dict[str, str] = {}
        super().run()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(self.build_temp).resolve() / ext.name.rpartition(".")[2]
        compiler = find_compiler()
        nvcc = find_nvcc() if ext.name.endswith("_cuda") else None
        if compiler is None:
            self.leave_out(ext, "there was no C++ compiler; install g++ or clang++ and reinstall mtlkernels from source")
        elif not ext.name.endswith("_cuda"):
            build_cpu(compiler, torch_folder(), folder, target)
        elif nvcc is None:
            off = os.environ.get("MTLKERNELS_CUDA") == "0"
            self.leave_out(
                ext,
                "MTLKERNELS_CUDA was 0; reinstall from source without it"
                if off
                else "there was no nvcc; install the CUDA toolkit or set CUDA_HOME, and reinstall mtlkernels from source",
            )
        else:
            build_cuda(compiler, nvcc, torch_folder(), folder, target)
        (target.parent / "_build.json").write_text(json.dumps(self.notes) + "\n")

    def leave_out(self, ext: Extension, reason: str) -> None:
        library = ext.name.rpartition(".")[2]
        self.notes[library] = f"not built: {reason}"
        for stale in (Path(self.get_ext_fullpath(ext.name)), ROOT / "mtlkernels" / Path(self.get_ext_filename(ext.name)).name):
            stale.unlink(missing_ok=True)  # of an earlier build: it would be loaded, and contradict the note
        print(f"warning: {ext.name} is {self.notes[library]}", file=sys.stderr)

    def get_outputs(self) -> list[str]:
        # What was left out is a note and no library.
        return [output for output in super().get_outputs() if Path(output).exists()]

    def copy_extensions_to_source(self) -> None:
        """In-place and editable builds: the libraries and the note go beside the sources, where the package looks for them."""
        built = [Path(self.build_lib, self.get_ext_filename(ext.name)) for ext in self.extensions]
        for file in [*built, built[0].parent / "_build.json"]:
            if file.exists():
                target = ROOT / "mtlkernels" / file.name
                shutil.copyfile(file, target.with_suffix(".new"))
                target.with_suffix(".new").replace(target)  # a process that has loaded the old library keeps it


def torch_folder() -> Path:
    """Folder of the torch to build with."""
    try:
        import torch
    except ImportError:
        sys.exit("building mtlkernels needs torch >= 2.11; install it first and use `pip install --no-build-isolation .`.")
    return Path(torch.__file__).parent


setup(
    ext_modules=[Extension(f"mtlkernels.{name}", sources=[], py_limited_api=True) for name in ("_C", "_C_cuda")],
    cmdclass={"build_ext": NinjaBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
