"""block_linear in Triton: y = act(x W^T + b) for a weight W of which only whole blocks are kept.

The kept blocks of one row of blocks are, side by side, a dense matrix. A program multiplies a tile
of x's rows by that matrix, the panel, and takes x chunk by chunk at the columns that the panel
keeps. The gradient to the input is the same walk over the turned list: chunks of the output's
gradient, panels of columns of blocks, so one kernel serves both.

Floor on a GPU of P FLOP/s, with L FLOP/s' worth of bytes from its L2 cache: every step of k reads
m + panel numbers for m * panel products, whatever the sparsity, so a panel of 16 or 32 is bound by
the reads of x and not by the tensor cores. The same mask stored with taller panels (32, 64 or 128
rows, the union of their columns) reads x once for all of them and can be faster, zeros included.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .epilogue import finish, store_tile
from .launch import DTYPES, arch_of, check_dtype, check_operand, precision
from .tiles import Tile, pick_tile

__all__ = ["DTYPES", "SIDES", "launch", "launch_grad_x", "serves"]

SIDES = (16, 32, 64, 128)  # of the blocks that have a kernel
_GROUP_M = 8  # tiles of x's rows that go through the panels together
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


def serves(values: Tensor) -> bool:
    """Return whether blocks [kept, bw, bh] have sides that the kernels are made for."""
    return values.shape[1] in SIDES and values.shape[2] in SIDES


def launch(
    x: Tensor, values: Tensor, row_offsets: Tensor, columns: Tensor, schedule: Tensor,
    shape: tuple[int, int], bias: Tensor | None = None, activation: int = 0,
    tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """Return act(x W^T + bias).

    x            [M, K] contiguous, float16, bfloat16 or float32
    values       [kept, bw, bh] contiguous, dtype of x; sides of blocks in SIDES
    row_offsets  [rows + 1] int32, rows = ceil(N / bh)
    columns      [kept] int32 in [0, width), width = ceil(K / bw)
    schedule     int32 of formats.schedule.make_schedule
    shape        (N, K)
    bias         [N], dtype of x, or None
    activation   0 none, 1 ReLU, 2 GELU, 3 its tanh form
    tile         block sizes; None takes pick_tile's
    returns      [M, N], accumulated in float32, cast to x.dtype

    float32 as in launch.precision. Deterministic; runs on the current stream. Raises TypeError and
    ValueError where an operand does not fit; what the indices hold is not looked at.
    """
    (M, K), N = x.shape, shape[0]
    rows, width = _check("block_linear", values, row_offsets, columns, schedule, shape)
    check_operand("block_linear", "x", x, (M, shape[1]), values, values.dtype)
    if bias is not None:
        check_operand("block_linear", "bias", bias, (N,), values, values.dtype)
    bw, bh = values.shape[1:]
    if tile is None:
        density = columns.numel() / max(rows * width, 1)
        tile = pick_tile(f"block_linear/{bh}", (M, N, K), density, x.dtype, arch_of(x))
    index = (row_offsets, columns, columns, schedule)
    return _multiply(x, values, index, N, bias, activation, tile, turned=False)


def launch_grad_x(
    grad: Tensor, values: Tensor, row_offsets: Tensor, columns: Tensor, schedule: Tensor,
    shape: tuple[int, int], tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """Return grad W [M, K] for grad [M, N] contiguous; the other arguments are those of launch."""
    (M, N), K = grad.shape, shape[1]
    rows, width = _check("block_linear_grad_x", values, row_offsets, columns, schedule, shape)
    check_operand("block_linear_grad_x", "grad", grad, (M, shape[0]), values, values.dtype)
    kept, bw, _ = values.shape
    if tile is None:
        density = kept / max(rows * width, 1)
        # The same walk, so the same tiles: of panels bw wide.
        tile = pick_tile(f"block_linear/{bw}", (M, K, N), density, grad.dtype, arch_of(grad))
    sizes = [rows, width, width + 1, kept, kept]
    _, order, offsets, blocks, rows_of = schedule.split(sizes)
    return _multiply(grad, values, (offsets, rows_of, blocks, order), K, None, 0, tile, turned=True)


def _check(
    op: str, values: Tensor, row_offsets: Tensor, columns: Tensor, schedule: Tensor,
    shape: tuple[int, int],
) -> tuple[int, int]:  # fmt: skip
    """Return the rows and columns of blocks; raise unless the parts of W fit each other."""
    check_dtype(op, "values", values)
    if values.dim() != 3 or not serves(values):
        raise ValueError(f"{op}: expected sides in {SIDES}, got values {tuple(values.shape)}")
    kept, bw, bh = values.shape
    rows, width = triton.cdiv(shape[0], bh), triton.cdiv(shape[1], bw)
    check_operand(op, "values", values, (kept, bw, bh), values, values.dtype)
    scheduled = rows + width + (width + 1) + 2 * kept
    for name, index, size in (
        ("row_offsets", row_offsets, rows + 1),
        ("columns", columns, kept),
        ("schedule", schedule, scheduled),
    ):
        check_operand(op, name, index, (size,), values, torch.int32)
    return rows, width


def _multiply(
    x: Tensor, values: Tensor, index: tuple[Tensor, ...], N: int, bias: Tensor | None,
    activation: int, tile: Tile, *, turned: bool,
) -> Tensor:  # fmt: skip
    """Return act(x W^T + bias) [M, N]; index = (offsets, list, blocks, order) of the panels."""
    (M, K), kept = x.shape, values.shape[0]
    chunk, panel = values.shape[1:] if not turned else values.shape[:0:-1]
    y = x.new_empty(M, N)
    if y.numel() == 0:
        return y
    panels = triton.cdiv(N, panel)
    # A panel is not cut into more parts than it has blocks, on average; a power of two, as every
    # number is a compilation.
    parts = 1 << (min(tile.split, max(kept // panels, 1)).bit_length() - 1)
    out = y if parts == 1 else x.new_empty(parts, M, N, dtype=torch.float32)
    tma = tile.tma and tile.k <= chunk and kept > 0 and tma_reads(x) and tma_reads(values)
    operands = _describe(x, values, tile, panel, turned) if tma else (x, values)
    ends = (None, 0) if parts > 1 else (bias, activation)
    with torch.cuda.device_of(x):
        panel_kernel[(triton.cdiv(M, tile.m) * panels, parts)](
            *operands, *index, ends[0], out, M, K, N, panels,
            TURNED=turned, CHUNK=chunk, PANEL=panel, EVEN_K=K % chunk == 0,
            HAS_BIAS=ends[0] is not None, ACTIVATION=ends[1], PRECISION=precision(x.dtype),
            PARTS=parts, TMA=tma, GROUP_M=_GROUP_M, BLOCK_M=tile.m, BLOCK_K=tile.k,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    if parts > 1:
        finish(out, y, bias, activation)
    return y


def tma_reads(tensor: Tensor) -> bool:
    """Return whether TMA can read rows of tensor: it wants 16-byte places."""
    aligned = tensor.data_ptr() % 16 == 0
    return aligned and tensor.shape[-1] * tensor.element_size() % 16 == 0


def _describe(
    x: Tensor, values: Tensor, tile: Tile, panel: int, turned: bool
) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Return descriptors of x and of values [kept * bw, bh], and the boxes they are read in."""
    matrix = values.flatten(0, 1)
    box = [panel, tile.k] if turned else [tile.k, panel]
    return TensorDescriptor.from_tensor(x, [tile.m, tile.k]), TensorDescriptor.from_tensor(
        matrix, box
    )
