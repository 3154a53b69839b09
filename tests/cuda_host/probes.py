"""probes_*.cu for a real GPU, compiled by nvcc when a test asks for it."""

from __future__ import annotations

import functools
import subprocess

import emulated
import ninja_plan
import pytest
import torch


def _compile(tool: str, arch: str) -> str:
    """Compile and link them for one architecture; returns the path of the library."""
    out = emulated.ROOT / "build" / "probes"
    out.mkdir(parents=True, exist_ok=True)
    include = ninja_plan.torch_include()
    library = out / "liveweight_probes.so"
    sources = " ".join(map(str, sorted(emulated.HERE.glob("probes_*.cu"))))
    command = (
        f"{tool} -std=c++20 -O3 --expt-relaxed-constexpr -Xcompiler=-fPIC,-fvisibility=hidden "
        f"-DUSE_CUDA {ninja_plan.ABI} -gencode=arch=compute_{arch},code=sm_{arch} "
        f"-I{emulated.CSRC} -isystem {include} -shared -cudart static -o {library} "
        f"{sources} -L{include.parent / 'lib'} -ltorch_cpu -ltorch_cuda"
    )
    done = subprocess.run(command.split(), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc failed on probes_*.cu:\n{done.stderr[-4000:]}")
    return str(library)


@functools.cache
def load() -> None:
    """Compile and load torch.ops.liveweight_probes for the present GPU; skips without nvcc."""
    tool = ninja_plan.nvcc()
    if tool is None:
        pytest.skip("nvcc is not installed: probes_*.cu cannot be compiled")
    major, minor = torch.cuda.get_device_capability()
    torch.ops.load_library(_compile(tool, f"{major}{minor}"))
