"""What the kernels of delta_linear must have become."""

from __future__ import annotations

from cuda_code import Expected

# A loop handles 32 entries at once and has a path for 24 more at a stream's end, both of them in
# its body: 56 gathers. At 90 % sparsity an entry stands for 10 dense weights less 4 % of fillers.
GATHERS = 56
WEIGHTS = GATHERS * 9.6


def rows(tokens: int, most: float, shared: int) -> Expected:
    """Return what the kernel for so many tokens must be: one block of 16 warps fills registers."""
    return Expected(
        kernel=rf"delta_linear_rows<\w+, \d, {tokens}, \d>",
        must=("LDG.128", "LDS", "LEA"),
        must_not=("ATOM", "RED"),
        shared=shared,
        loop="LDS",
        per_loop=GATHERS,
        weights=WEIGHTS,
        budget=2.2,
        most=most,
    )


# x of 8192 columns; 6144 for 8 tokens, as much as every GPU has shared memory for.
EXPECTED = [
    rows(1, 0.9, 8192 * 2),
    rows(2, 1.1, 8192 * 4),
    rows(4, 1.6, 8192 * 8),
    rows(8, 2.4, 6144 * 16),
    Expected(kernel="expand_slices<", must=("LDG.128", "STG.128"), must_not=("ATOM",), blocks=2),
    Expected(kernel="gather_slices<", must=("LDG.128", "STG.128"), must_not=("ATOM",), blocks=2),
    Expected(kernel="finish_delta_linear|activate_elements", blocks=4),
]
