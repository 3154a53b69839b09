"""The walk along a panel of kept blocks: the device code of block_linear and its gradient to x.

What Triton 3.6 makes of it, by benchmarks/results/gpu-machine-code.md and its listings:

* 16-bit operands arrive in 16-byte asynchronous copies or by tensor descriptors, in every shape.
* float32: the values of the product lie with their outputs side by side, which sm_90's instruction
  does not take. In one TF32 product they are turned in 4-byte asynchronous copies, in three on
  the way through registers. The gradient to x has them the right way round.
* warp_specialize on sm_90: no effect with 8 warps; the compiler aborts with 4 where a loop carries
  numbers from step to step, as this one carries its chunks. Not used.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .epilogue import store_tile

_PLAIN = ["offsets_ptr", "list_ptr", "blocks_ptr", "order_ptr"]  # views at any place of a tensor


@triton.jit
def find_place(pid, M, panels, order_ptr, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr):
    """Return (first row of x, panel) of a program.

    GROUP_M tiles of rows go through all panels together, so that their x stays in the L2 cache, and
    through the panels with the most work first, so that little is left when programs run out.
    """
    tiles = tl.cdiv(M, BLOCK_M)
    group = pid // (GROUP_M * panels)
    size = tl.minimum(tiles - group * GROUP_M, GROUP_M)
    rest = pid % (GROUP_M * panels)
    tile = group * GROUP_M + rest % size
    return tile * BLOCK_M, tl.load(order_ptr + rest // size)


@triton.jit
def find_share(offsets_ptr, panel, part, PARTS: tl.constexpr, TOGETHER: tl.constexpr):
    """Return where a part of the panel's blocks begins and ends, in whole steps of TOGETHER."""
    first = tl.load(offsets_ptr + panel)
    last = tl.load(offsets_ptr + panel + 1)
    steps = tl.cdiv(last - first, TOGETHER)
    begin = first + (steps * part) // PARTS * TOGETHER
    end = first + (steps * (part + 1)) // PARTS * TOGETHER
    return begin, tl.minimum(end, last)


@triton.jit
def list_place(step, first, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return where a step's blocks stand in the list: a number, or one for each k of the step."""
    if BLOCK_K > CHUNK:
        place = first + step * (BLOCK_K // CHUNK) + tl.arange(0, BLOCK_K) // CHUNK
    else:
        place = first + step // (CHUNK // BLOCK_K)
    return place


@triton.jit
def inner_start(step, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return at which column of its block a step begins."""
    return 0 if BLOCK_K > CHUNK else step % (CHUNK // BLOCK_K) * BLOCK_K


@triton.jit
def load_x(
    x, m, M, K, chunk, start, inside, CHUNK: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Return x [BLOCK_M, BLOCK_K] at the columns of a step's chunks, zero outside."""
    if TMA:
        x = x.load([m, chunk * CHUNK + start])
    else:
        row = m + tl.arange(0, BLOCK_M)
        at = chunk * CHUNK + start + tl.arange(0, BLOCK_K) % CHUNK
        mask = (row < M)[:, None]
        if BLOCK_K > CHUNK:
            # The compiler cannot know that loaded chunks begin at multiples of CHUNK; told so, it
            # copies 16 bytes at a time.
            at = tl.max_contiguous(tl.multiple_of(at, CHUNK), CHUNK)
            mask = mask & inside[None, :]
        if not EVEN_K:
            mask = mask & (at < K)[None, :]
        x = tl.load(x + row.to(tl.int64)[:, None] * K + at[None, :], mask=mask, other=0.0)
    return x


@triton.jit
def load_panel(
    values, block, start, inside, TURNED: tl.constexpr, CHUNK: tl.constexpr, PANEL: tl.constexpr,
    BLOCK_K: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Return [BLOCK_K, PANEL] of the panel: of values [kept, CHUNK, PANEL], or, TURNED, of
    values [kept, PANEL, CHUNK], zero outside."""
    if TMA:
        if TURNED:
            panel = tl.trans(values.load([block * PANEL, start]))
        else:
            panel = values.load([block * CHUNK + start, 0])
    else:
        k = start + tl.arange(0, BLOCK_K) % CHUNK
        p = tl.arange(0, PANEL)
        here = block.to(tl.int64) * (CHUNK * PANEL)  # passes 2**31 for large layers
        if TURNED:
            at = here + k
            if BLOCK_K > CHUNK:
                at = tl.max_contiguous(tl.multiple_of(at, CHUNK), CHUNK)
            at = at[:, None] + p[None, :] * CHUNK
        else:
            at = (here + k * PANEL)[:, None] + p[None, :]
        mask = inside[:, None] if BLOCK_K > CHUNK else None
        panel = tl.load(values + at, mask=mask, other=None if mask is None else 0.0)
    return panel


@triton.jit(do_not_specialize=["M", "panels"], do_not_specialize_on_alignment=_PLAIN)
def panel_kernel(
    x, values, offsets_ptr, list_ptr, blocks_ptr, order_ptr, bias_ptr, y_ptr,
    M, K, N, panels,
    TURNED: tl.constexpr, CHUNK: tl.constexpr, PANEL: tl.constexpr, EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    PARTS: tl.constexpr, TMA: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of y [PARTS, M, N]: BLOCK_M rows of x [M, K] by the panel, or by a part of it.

    x and values are contiguous tensors, or, with TMA, descriptors of them as matrices.
    """
    TOGETHER: tl.constexpr = BLOCK_K // CHUNK if BLOCK_K > CHUNK else 1  # blocks a step
    STEPS: tl.constexpr = 1 if BLOCK_K > CHUNK else CHUNK // BLOCK_K  # steps a block
    first_m, panel = find_place(tl.program_id(0), M, panels, order_ptr, BLOCK_M, GROUP_M)
    part = tl.program_id(1)
    first, last = find_share(offsets_ptr, panel, part, PARTS, TOGETHER)

    # The numbers of a step's blocks are loaded one step ahead: inside a step they would be the
    # address of another load, on which the compiler spends half of its pipeline.
    place = list_place(0, first, CHUNK, BLOCK_K)
    chunk = tl.load(list_ptr + place, mask=place < last, other=0)
    block = tl.load(blocks_ptr + place, mask=place < last, other=0) if TURNED else place
    acc = tl.zeros((BLOCK_M, PANEL), tl.float32)
    for step in range(tl.cdiv(last - first, TOGETHER) * STEPS):
        start = inner_start(step, CHUNK, BLOCK_K)
        inside = place < last
        x_tile = load_x(
            x, first_m, M, K, chunk, start, inside, CHUNK, EVEN_K, BLOCK_M, BLOCK_K, TMA
        )
        w_tile = load_panel(values, block, start, inside, TURNED, CHUNK, PANEL, BLOCK_K, TMA)
        acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)
        place = list_place(step + 1, first, CHUNK, BLOCK_K)
        chunk = tl.load(list_ptr + place, mask=place < last, other=0)
        block = tl.load(blocks_ptr + place, mask=place < last, other=0) if TURNED else place

    y_ptr += part * tl.cast(M, tl.int64) * N
    if BLOCK_M * PANEL > 128 * 128:
        # In halves: a whole large tile in the middle of GELU does not fit into the registers.
        HALF: tl.constexpr = PANEL // 2
        halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1))
        left, right = tl.split(halves)
        n = panel * PANEL
        store_tile(left, y_ptr, bias_ptr, first_m, n, M, N, HAS_BIAS, ACTIVATION)
        store_tile(right, y_ptr, bias_ptr, first_m, n + HALF, M, N, HAS_BIAS, ACTIVATION)
    else:
        store_tile(acc, y_ptr, bias_ptr, first_m, panel * PANEL, M, N, HAS_BIAS, ACTIVATION)
