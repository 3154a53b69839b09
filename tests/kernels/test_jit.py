"""Launchers through Triton's own JIT, without a GPU: what they would start, for sm_90 and sm_80."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).with_name("jit_check.py")
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10}
PRODUCTS = {
    "panel_kernel", "sampled_kernel", "narrow_kernel", "masked_product_kernel",
    "masked_grad_kernel", "block_conv2d_kernel", "block_conv2d_grad_x_kernel",
    "block_conv2d_grad_values_kernel",
}  # fmt: skip


def started(arch: int, word: str = "") -> list[dict]:
    # Its own process: there TRITON_INTERPRET must be unset before Triton is imported.
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(arch), *([word] if word else [])],
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module", params=[(90, ""), (80, "8192 tokens, bfloat16")], ids=["90", "80"])
def kernels(request) -> tuple[int, list[dict]]:
    pytest.importorskip("triton", reason="triton is not installed")
    arch, word = request.param
    return arch, started(arch, word)


def test_every_kernel_can_be_started(kernels):
    arch, found = kernels
    assert found
    for kernel in found:
        first, *others = kernel["grid"]
        assert 0 < first < 2**31 and all(0 < size < 2**16 for size in others), kernel
        assert kernel["shared_bytes"] <= SHARED_LIMIT[arch], kernel


def test_products_use_what_their_gpu_is_fast_at(kernels):
    arch, found = kernels
    large = [k for k in found if k["kernel"] in PRODUCTS and "8192 tokens, bf" in k["launcher"]]
    assert len(large) >= 8
    for kernel in large:
        assert kernel["wgmma" if arch == 90 else "mma"] > 0, kernel
        assert kernel["copies"] or kernel["tma"], kernel


def test_every_product_kernel_is_among_them(kernels):
    arch, found = kernels
    names = {kernel["kernel"] for kernel in found}
    if arch == 90:
        assert names >= PRODUCTS
        assert any(kernel["tma"] for kernel in found)
