"""The CUDA C++ ops on the CPU: csrc/cuda/*.cu, launchers and all, compiled by g++ over cuda_host.h.

    library = emulated.load()
    torch.ops.liveweight_emulated.activity_stats_(stats, x, 0.0)  # every op of csrc/cuda
    library.set_order("random", seed=3)

Objects and the precompiled torch headers lie in build/emulated; ninja makes what has changed. With
LIVEWEIGHT_SANITIZE in the environment they are built so, in a folder of their own (sanitized.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import torch

from liveweight._schemas import SCHEMAS

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc" / "cuda"
NAMESPACE = "liveweight_emulated"
ORDERS = {"forward": 0, "reverse": 1, "random": 2}

sys.path.insert(0, str(ROOT / "csrc" / "build"))

import compile_native  # noqa: E402
import ninja_plan  # noqa: E402

TORCH_HEADERS = (
    "torch/csrc/inductor/aoti_torch/c/shim.h",
    "torch/csrc/stable/accelerator.h",
    "torch/csrc/stable/library.h",
    "torch/csrc/stable/ops.h",
    "torch/csrc/stable/tensor.h",
)


def available() -> bool:
    """Return whether this machine can compile the emulator."""
    try:
        return bool(ninja_plan.compiler()) and bool(compile_native._ninja())
    except ninja_plan.Missing:
        return False


def folder() -> pathlib.Path:
    """Return where the objects lie: one folder per set of sanitizers."""
    return ROOT / "build" / ("emulated_sanitized" if sanitizers() else "emulated")


def sanitizers() -> str:
    return os.environ.get("LIVEWEIGHT_SANITIZE", "")


def compiler() -> list[str]:
    """Return the compiler with the flags that every file over cuda_host.h is compiled with."""
    # What is compiled runs for seconds, and is compiled on every change: the compiler's own time
    # decides. These checks of UBSan's would take a quarter of it and find what a crash shows, too.
    speed = "-O1"
    if sanitizers():
        without = "null,object-size,pointer-overflow,return,unreachable"
        speed = f"{ninja_plan.optimize()} -O0 -g0 -fno-sanitize={without}"
    flags = (
        f"-std=c++20 {speed} -fPIC -fvisibility=hidden -U_FORTIFY_SOURCE -ffp-contract=off "
        f"-Wall -Wextra -Werror -Wno-unknown-pragmas -Wno-clobbered {ninja_plan.ABI} "
        f"-I{CSRC} -I{HERE} -isystem {ninja_plan.torch_include()}"
    )
    return [*ninja_plan.compiler().split(), *flags.split()]


def _write_prefix(build: pathlib.Path) -> pathlib.Path:
    """Write the header that every file is compiled behind: torch's, then the emulator's."""
    lines = [*(f"#include <{name}>" for name in TORCH_HEADERS), '#include "cuda_host.h"', ""]
    path, text = build / "prefix.h", "\n".join(lines)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return path


def build() -> pathlib.Path:
    """Compile what has changed and return the shared object; raises with the compiler's errors."""
    out = folder()
    out.mkdir(parents=True, exist_ok=True)
    plan = ninja_plan.Plan(out, out)
    cxx, prefix = " ".join(compiler()), _write_prefix(out)
    compiled_prefix = out / "prefix.h.gch"
    plan.rule("prefix", f"{cxx} -MMD -MF $out.d -x c++-header $in -o $out")
    plan.edge("prefix", compiled_prefix, [prefix])
    plan.rule("cpp", f"{cxx} -MMD -MF $out.d -include {prefix} -x c++ -c $in -o $out")
    libraries = f"-L{ninja_plan.torch_include().parent / 'lib'} -ltorch_cpu"
    plan.rule("link", f"{cxx} -shared -o $out $in {libraries}", depfile=False)
    objects = []
    sources = [*CSRC.glob("*.cu"), *HERE.glob("probes_*.cu"), HERE / "control.cu"]
    for source in sorted(sources):
        objects.append(out / f"{source.stem}.o")
        # What the compiled prefix holds is not among the object's own dependencies.
        plan.edge("cpp", objects[-1], [source], needs=(compiled_prefix,))
    library = out / "liveweight_emulated.so"
    plan.link("link", library.name, objects)
    with open(out / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two runs of the tests may start together
        command = [*compile_native._ninja(), "-f", str(plan.write())]
        done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(f"the emulated CUDA ops do not compile:\n{done.stdout[-8000:]}")
    return library


class Emulated:
    """The loaded library: torch.ops.liveweight_emulated, and the schedule of its threads."""

    def __init__(self, path: pathlib.Path):
        self._ops = torch.library.Library(NAMESPACE, "DEF")
        for name, schema in SCHEMAS.items():
            self._ops.define(name + " ".join(schema.split()))
        torch.ops.load_library(str(path))
        self._c = ctypes.CDLL(str(path))
        self._c.lw_emulated_barriers.restype = ctypes.c_char_p

    def set_order(self, order: str, seed: int = 0) -> None:
        """Run threads and blocks in "forward", "reverse" or "random" order from now on."""
        self._c.lw_emulated_order(ORDERS[order], seed)

    @contextlib.contextmanager
    def drop_barrier(self, file: str, line: int) -> Iterator[None]:
        """Ignore the barrier of this source file and line inside the with block."""
        self._c.lw_emulated_drop(file.encode(), line)
        try:
            yield
        finally:
            self._c.lw_emulated_drop(b"", 0)

    def barriers(self) -> list[tuple[str, int]]:
        """Return file and line of every barrier that a kernel has met so far."""
        lines = self._c.lw_emulated_barriers().decode().splitlines()
        return sorted((file, int(line)) for file, line in (text.split(":") for text in lines))


@functools.cache
def load() -> Emulated:
    """Build the library where needed, and load it once."""
    return Emulated(build())
