"""The machine a result names, and whether the package is built for it."""

from __future__ import annotations

import datetime
import os
import pathlib
import platform
import subprocess

import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
TRITON = (
    "masked_linear", "masked_linear_grad_x", "masked_linear_grad_weight", "pack_mask_bits",
    "block_linear", "block_linear_grad_x", "block_linear_grad_values",
    "block_conv2d", "block_conv2d_grad_x", "block_conv2d_grad_values",
)  # fmt: skip
COMPILED = (
    "activity_stats_", "patch_gram", "gram_norms_", "mass_mask", "top_k_mask", "signal_mask",
    "bitmap_linear", "bitmap_to_dense", "bitmap_linear_grad_values",
    "delta_linear", "delta_to_dense", "delta_linear_grad_values",
    "semi_structured_linear", "semi_structured_pack", "semi_structured_to_dense",
    "semi_structured_take", "kernelwise_conv2d",
)  # fmt: skip
SERVED = dict.fromkeys(TRITON, "triton") | dict.fromkeys(COMPILED, "cuda c++")
SERVED["semi_structured_torch_linear"] = "torch"


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def machine() -> dict[str, str]:
    """Return what a result must name: GPU, driver, versions, date and commit."""
    import triton

    device = torch.cuda.get_device_properties(0)
    commit = _output("git", "rev-parse", "HEAD")
    changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"]
    driver = _output(*query).splitlines() or ["unknown"]
    nvcc = os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc")
    return {
        "gpu": f"{device.name}, sm_{device.major}{device.minor}, "
        f"{device.multi_processor_count} multiprocessors, L2 {device.L2_cache_size >> 20} MiB",
        "driver, largest clock": driver[0],
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda})",
        "triton": triton.__version__,
        "nvcc": (_output(nvcc, "--version").splitlines() or ["unknown"])[-1],
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
        "commit": commit + (" with local changes" if changed not in ("", "unknown") else ""),
    }


def build_problems() -> list[str]:
    """Return what keeps an op from its GPU kernel; empty where all is built and loaded."""
    from liveweight import _library, ops  # noqa: F401

    served = {op: devices["cuda"] for op, devices in _library.backends().items()}
    return [
        f"{op} is served by {served.get(op, 'nothing')}, expected {kind} ({_library.status()})"
        for op, kind in SERVED.items()
        if served.get(op) != kind
    ]
