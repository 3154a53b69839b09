"""The tiles of every Triton kernel: data alone, rewritten per architecture by benchmarks/tune.py.

TABLE[op][arch] lists rows (item_bytes, (M, N, K), density, tile): for operands of item_bytes bytes,
near this product and this kept share, take tile = (m, n, k, warps, stages[, split[, tma]]).
Every op lists 80, 86 and 90, and any newer architecture that wants rows of its own.

Rows are chosen from the compiler's reports (benchmarks/results/gpu-machine-code.md) until
benchmarks/tune.py has timed them; MEASURED says which architectures those are, and on what.
"""

from __future__ import annotations

MEASURED: dict[int, str] = {}

TABLE: dict[str, dict[int, list[tuple]]] = {
    "masked_linear": {
        80: [
            (2, (16, 4096, 4096), 1.0, (16, 32, 128, 4, 5)),
            (2, (64, 4096, 4096), 1.0, (64, 64, 64, 4, 5)),
            (2, (1024, 4096, 4096), 1.0, (128, 128, 32, 8, 5)),
            (4, (16, 4096, 4096), 1.0, (16, 32, 64, 4, 5)),
            (4, (512, 4096, 4096), 1.0, (128, 64, 32, 8, 5)),
        ],
        86: [
            (2, (16, 4096, 4096), 1.0, (16, 32, 128, 4, 5)),
            (2, (64, 4096, 4096), 1.0, (64, 64, 64, 4, 5)),
            (2, (1024, 4096, 4096), 1.0, (128, 128, 32, 8, 5)),
            (4, (16, 4096, 4096), 1.0, (16, 32, 64, 4, 5)),
            (4, (512, 4096, 4096), 1.0, (128, 64, 32, 8, 5)),
        ],
        90: [
            (2, (16, 4096, 4096), 1.0, (16, 32, 128, 4, 5)),
            (2, (64, 4096, 4096), 1.0, (64, 64, 64, 4, 5)),
            (2, (1024, 4096, 4096), 1.0, (256, 64, 64, 8, 5)),
            (4, (16, 4096, 4096), 1.0, (16, 32, 64, 4, 5)),
            (4, (512, 4096, 4096), 1.0, (128, 64, 32, 8, 5)),
        ],
    },
}  # fmt: skip
