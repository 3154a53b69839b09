"""The wrappers of ptx_dot.cuh against what the PTX manual says, on the emulator and on a GPU."""

from __future__ import annotations

import pytest
import torch


def words(n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (n,), generator=generator, dtype=torch.int64)


def part(word: torch.Tensor, start: int, bits: int) -> torch.Tensor:
    return word >> start & (1 << bits) - 1


@pytest.mark.sanitized
def test_dot_products_running_sums_and_cached_loads(kernels):
    a, b, c = (words(256, seed) for seed in range(3))
    halves = [part(a, i, 16) - 65536 * part(a, i + 15, 1) for i in (0, 16)]
    want = torch.stack(
        [
            c + sum(part(a, i, 8) * part(b, i, 8) for i in (0, 8, 16, 24)),
            c + halves[0] * part(b, 0, 8) + halves[1] * part(b, 8, 8),
            c + halves[0] * part(b, 16, 8) + halves[1] * part(b, 24, 8),
            c.view(-1, 32).cumsum(1).view(-1),
            c,
        ]
    )
    for _ in kernels.orders():
        got = kernels.probe("dot")(*(v.int().to(kernels.device) for v in (a, b, c)))
        assert torch.equal(got.cpu(), (want + 2**31) % 2**32 - 2**31)
