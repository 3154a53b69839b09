"""Plan of the compiled part: which shared objects, from which files, with which commands.

Three shared objects go into the package folder:

* ``_cpu.so``   torch ops for CPUs. Each file of ``csrc/cpu`` is compiled three times, for AVX-512,
  for AVX2 and for any x86-64 (or any other CPU: then only once); the choice is made at run time.
* ``_cuda.so``  torch ops for CUDA, wherever nvcc is found.
* ``_pack...so`` host-side packers: pybind11 and numpy, no torch.

The first two use only PyTorch's stable ABI and no Python.h, so one file serves every CPython and
every torch >= 2.11. Environment: LIVEWEIGHT_TORCH_INCLUDE (folder of torch's headers),
LIVEWEIGHT_CUDA=0|1 (never | must), LIVEWEIGHT_CUDA_ARCHS="80;90a", CXX, CUDA_HOME.
LIVEWEIGHT_SANITIZE="address,undefined" builds the C++ parts so (sanitize.py runs tests on that).
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import platform
import shutil
import sysconfig

ROOT = pathlib.Path(__file__).resolve().parents[2]
ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"  # 2.11.0
WARN = "-Wall -Wextra -Wno-unused-parameter"
ISA_FLAGS = {
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c",
    "avx2": "-mavx2 -mfma -mf16c",
    "plain": "",
}


def optimize() -> str:
    """Return the flags for speed, or those of a build that stops at the first error in memory."""
    sanitizers = os.environ.get("LIVEWEIGHT_SANITIZE", "")
    if not sanitizers:
        return "-O3"
    # vptr asks for type information that torch's hidden symbols do not share.
    stop = "-fno-sanitize=vptr -fno-sanitize-recover=all -fno-omit-frame-pointer"
    return f"-O1 -g1 -fsanitize={sanitizers} {stop}"


class Missing(Exception):
    """A tool or header that the compiled part needs is not there; the text says which."""


def torch_include() -> pathlib.Path:
    env = os.environ.get("LIVEWEIGHT_TORCH_INCLUDE")
    if env:
        return pathlib.Path(env)
    spec = importlib.util.find_spec("torch")  # found, not imported
    if spec is None or spec.origin is None:
        raise Missing("torch headers not found: install torch >= 2.11 first")
    return pathlib.Path(spec.origin).parent / "include"


def compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        if name and shutil.which(name.split()[0]):
            return name
    raise Missing("no C++ compiler found (looked for $CXX, g++, c++, clang++)")


def nvcc() -> str | None:
    wish = os.environ.get("LIVEWEIGHT_CUDA", "")
    if wish == "0":
        return None
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc", path=os.path.join(home, "bin")) or shutil.which("nvcc")
    if found is None and wish == "1":
        raise Missing("LIVEWEIGHT_CUDA=1 but no nvcc was found (looked in $CUDA_HOME/bin and PATH)")
    return found


def _quote(path: object) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class Plan:
    """Collects rules and edges and writes ``build.ninja``."""

    def __init__(self, build_dir: pathlib.Path, out_dir: pathlib.Path):
        self.build_dir, self.out_dir = build_dir, out_dir
        self.lines: list[str] = ["ninja_required_version = 1.5", f"builddir = {_quote(build_dir)}"]
        self.targets: list[str] = []

    def rule(self, name: str, command: str, depfile: bool = True) -> None:
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        if depfile:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def edge(
        self,
        rule: str,
        out: pathlib.Path,
        inputs: list[pathlib.Path],
        needs: tuple[pathlib.Path, ...] = (),
        **variables,
    ) -> None:
        """Make `out` from inputs; a change of what it needs beside them makes it again, too."""
        beside = f" | {' '.join(map(_quote, needs))}" if needs else ""
        self.lines.append(f"build {_quote(out)}: {rule} {' '.join(map(_quote, inputs))}{beside}")
        self.lines += [f"  {key} = {value}" for key, value in variables.items()]

    def add_cpu(self, include: pathlib.Path) -> None:
        cxx = compiler()
        x86 = platform.machine() in ("x86_64", "AMD64")
        flags = f"-std=c++20 {optimize()} -fPIC -fvisibility=hidden -ffp-contract=fast {WARN} {ABI}"
        self.rule("cpu", f"{cxx} -MMD -MF $out.d {flags} $isa -isystem {include} -c $in -o $out")
        self.rule(
            "link_cpu",
            f"{cxx} {optimize()} -shared -o $out $in -L{include.parent / 'lib'} -ltorch_cpu",
            depfile=False,
        )
        objects = []
        for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
            for isa in ISA_FLAGS if x86 else ("plain",):
                obj = self.build_dir / "cpu" / f"{source.stem}.{isa}.o"
                base = " -DLW_BASE" if isa == "plain" else ""
                x86_flag = " -DLW_X86" if x86 else ""
                self.edge(
                    "cpu", obj, [source], isa=f"-DLW_ISA={isa}{base}{x86_flag} {ISA_FLAGS[isa]}"
                )
                objects.append(obj)
        self.link("link_cpu", "_cpu.so", objects)

    def add_pack(self) -> None:
        spec = importlib.util.find_spec("pybind11")
        if spec is None or spec.origin is None:
            raise Missing("pybind11 not found")
        pybind = pathlib.Path(spec.origin).parent / "include"
        python = sysconfig.get_path("include")
        cxx = compiler()
        self.rule(
            "pack",
            f"{cxx} -MMD -MF $out.d -std=c++17 {optimize()} -fPIC -fvisibility=hidden {WARN} "
            f"-isystem {pybind} -isystem {python} -c $in -o $out",
        )
        self.rule("link_pack", f"{cxx} {optimize()} -shared -o $out $in", depfile=False)
        objects = []
        for source in sorted((ROOT / "csrc" / "pack").glob("*.cpp")):
            objects.append(self.build_dir / "pack" / f"{source.stem}.o")
            self.edge("pack", objects[-1], [source])
        self.link("link_pack", "_pack" + sysconfig.get_config_var("EXT_SUFFIX"), objects)

    def add_cuda(self, include: pathlib.Path, tool: str) -> None:
        sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
        archs = os.environ.get("LIVEWEIGHT_CUDA_ARCHS", "80;90a").split(";")
        gencode = " ".join(f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs)
        if archs[0].isdigit():  # PTX, from which a driver compiles for GPUs newer than the list
            gencode += f" -gencode=arch=compute_{archs[0]},code=compute_{archs[0]}"
        flags = (
            # Two targets at once: the longest file alone takes a minute.
            f"-std=c++20 -O3 -lineinfo --threads 2 --expt-relaxed-constexpr -Xcompiler=-fPIC,"
            f"-fvisibility=hidden -DUSE_CUDA {ABI} {gencode}"
        )
        self.rule("cuda", f"{tool} -MD -MF $out.d {flags} -isystem {include} -c $in -o $out")
        # An empty library with this name puts libtorch_cuda.so into NEEDED where torch has no CUDA.
        stub = self.build_dir / "cuda" / "libtorch_cuda.so"
        self.rule(
            "stub",
            f"{compiler()} -shared -Wl,-soname,libtorch_cuda.so -x c++ /dev/null -o $out",
            depfile=False,
        )
        self.edge("stub", stub, [])
        home = pathlib.Path(tool).resolve().parents[1]
        search = " ".join(f"-L{p}" for p in (stub.parent, include.parent / "lib", home / "lib64"))
        self.rule(
            "link_cuda",
            f"{tool} -shared {gencode} -cudart static -o $out $in {search} "
            "-ltorch_cpu -Xlinker --no-as-needed -ltorch_cuda",
            depfile=False,
        )
        objects = []
        for source in sources:
            objects.append(self.build_dir / "cuda" / f"{source.stem}.o")
            self.edge("cuda", objects[-1], [source])
        self.link("link_cuda", "_cuda.so", objects, order_only=stub)

    def link(
        self,
        rule: str,
        name: str,
        objects: list[pathlib.Path],
        order_only: pathlib.Path | None = None,
    ) -> None:
        out = self.out_dir / name
        extra = f" || {_quote(order_only)}" if order_only else ""
        self.lines.append(f"build {_quote(out)}: {rule} {' '.join(map(_quote, objects))}{extra}")
        self.targets.append(_quote(out))

    def write(self) -> pathlib.Path:
        path = self.build_dir / "build.ninja"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "\n".join([*self.lines, f"default {' '.join(self.targets)}", ""])
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
        return path
