"""What the kernels of mass_mask and top_k_mask must have become: they only read scores."""

from __future__ import annotations

from cuda_code import Expected

EXPECTED = [
    # 1024 threads and a row's keys in registers: one block, all of a multiprocessor's registers.
    Expected(kernel="select_rows<", blocks=1),
    Expected(kernel="assert_scores_are_valid|set_index", threads=32),
    Expected(kernel="count_digits|count_ties|write_flat", blocks=4),
    Expected(kernel="pick_digit|scan_ties|start_flat", blocks=1),
]
