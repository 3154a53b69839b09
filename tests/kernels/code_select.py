"""What the kernels of mass_mask, signal_mask and top_k_mask must have become."""

from __future__ import annotations

from cuda_code import Expected

# A row of 14336, held in shared memory by 16 warps: its keys, and the buckets of the histogram.
KEYS, BUCKETS = 4 * 14336, 4 * 2048
HELD = ("ATOMS", "LDG.128", "LDS.128", "STS.128")

EXPECTED = [
    # Two rows on a multiprocessor: one is loaded while the other is searched.
    Expected(
        kernel="select_rows<ByMass, .*true>",
        must=HELD,
        blocks=2,
        shared=KEYS + 3 * BUCKETS,
        threads=512,
        archs=("sm_90a",),
    ),
    Expected(
        kernel="select_rows<ByMass, .*true>",
        must=HELD,
        blocks=1,
        shared=KEYS + 3 * BUCKETS,
        threads=512,
        archs=("sm_80",),
    ),
    Expected(
        kernel="select_rows<ByCount, .*true>",
        must=HELD,
        blocks=2,
        shared=KEYS + BUCKETS,
        threads=512,
    ),
    Expected(kernel="select_rows<.*false>", must=("ATOMS", "LDG.128"), blocks=1),
    Expected(kernel="assert_scores_are_valid|set_index", threads=32),
    Expected(kernel="count_digits", must=("ATOMS",), blocks=4),
    Expected(kernel="count_ties|write_flat", blocks=4),
    Expected(kernel="pick_digit|scan_ties|start_flat", blocks=1),
]
