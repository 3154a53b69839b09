"""masked_linear in Triton: y = x (W o M)^T + b with the mask M as bits, and its gradient to x.

A first kernel sorts the tiles of W (mask_bits.py): empty ones are neither read nor multiplied, full
ones are multiplied as they lie, by the loop of a dense product, and only mixed ones are unpacked.

Floor on an H200: the longer of 2 M N K / 790 TFLOP/s for bfloat16 (its measured dense rate), over
the tiles that keep anything, and the bytes of x, W, the mask and y / 4.3 TB/s.

At density 1 what is left of the mask is the first kernel, which reads one bit a weight, 2 MB for
4096 x 4096. What then separates this from a vendor's product is the traffic between the L2 cache
and the multiprocessors: a tile of 256 x 128 takes a byte for 85 FLOP, 9.3 TB/s at the dense rate,
where kernels that share tiles between neighbouring multiprocessors, which Triton does not, take
half. In a mixed tile unpacking costs 3 to 5 instructions a weight (gpu-machine-code.md: the second
loop of a row against the first), so the taller the tile, the less of it shows.

Rows of x and W of other than a multiple of 16 elements are right but slow: they are read an element
or a few at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .epilogue import finish, store_tile
from .launch import arch_of, cdiv, check_dtype, check_operand, parts_of, precision, tma_reads
from .mask_bits import INTERPRETED, list_tiles, load_bits, select_kept
from .tiles import Tile, pick_tile

_GROUP_M = 8  # tiles of M that share a panel of W while it is in the L2 cache


@triton.jit
def load_tile(
    matrix, row, column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS_END: tl.constexpr, COLUMNS_END: tl.constexpr, TMA: tl.constexpr,
    TURNED: tl.constexpr = False,
):  # fmt: skip
    """Return [ROWS, COLUMNS] of matrix [rows, columns] from (row, column) on; TURNED: transposed.

    matrix is a pointer or, TMA, a descriptor. Outside the matrix there are zeros, except that
    without ROWS_END the last row is repeated, and without COLUMNS_END no column lies outside.
    """
    if TMA:
        tile = matrix.load([row, column])
        tile = tl.trans(tile) if TURNED else tile
    else:
        # Turned in the addresses, not afterwards: on sm_80 only a load that goes straight to a
        # product is copied asynchronously, and a left operand that is turned first does not.
        r = tl.expand_dims(row + tl.arange(0, ROWS), 0 if TURNED else 1)
        c = tl.expand_dims(column + tl.arange(0, COLUMNS), 1 if TURNED else 0)
        inside = c < columns if COLUMNS_END else None
        if ROWS_END:
            inside = (r < rows) & inside if COLUMNS_END else r < rows
        else:
            r = tl.minimum(r, rows - 1)
        # int64: row * columns passes 2**31 for large layers.
        at = matrix + (r.to(tl.int64) * columns + c)
        tile = tl.load(at, mask=inside, other=None if inside is None else 0.0)
    return tile


@triton.jit
def multiply_tile(
    acc, x, weight, bits_ptr, m, panel, step, M, N, K, words,
    MIXED: tl.constexpr, TURNED: tl.constexpr, EVEN: tl.constexpr, EVEN_P: tl.constexpr,
    PRECISION: tl.constexpr, PACKED: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Add to acc [BLOCK_P, BLOCK_M] one tile of W, from (panel, step) on, times that of x."""
    ROWS: tl.constexpr = BLOCK_R if TURNED else BLOCK_P  # of the tile of W
    COLUMNS: tl.constexpr = BLOCK_P if TURNED else BLOCK_R
    row, column, R = (step, panel, N) if TURNED else (panel, step, K)
    rows_end: tl.constexpr = TURNED and not EVEN
    columns_end: tl.constexpr = not EVEN_P if TURNED else not EVEN
    x_tile = load_tile(x, m, step, M, R, BLOCK_M, BLOCK_R, False, not EVEN, TMA)
    w_tile = load_tile(
        weight, row, column, N, K, ROWS, COLUMNS, rows_end, columns_end, TMA, TURNED and not MIXED
    )
    if MIXED:
        bits = load_bits(bits_ptr, row, column // 32, N, words, ROWS, COLUMNS // 32)
        w_tile = select_kept(w_tile, bits, PACKED)
        w_tile = tl.trans(w_tile) if TURNED else w_tile
    # W is the left operand: sm_90 takes that one, unpacked, from registers, and few tokens become
    # a narrow right operand instead of rows that its instruction has to fill.
    return tl.dot(w_tile, tl.trans(x_tile), acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=["M", "steps"])
def masked_product_kernel(
    x, weight, bits_ptr, bias_ptr, lists_ptr, counts_ptr, y_ptr, M, N, K, words, steps,
    TURNED: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN: tl.constexpr, EVEN_P: tl.constexpr,
    PRECISION: tl.constexpr, PACKED: tl.constexpr, TMA: tl.constexpr, PARTS: tl.constexpr,
    GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One tile of x (W o M)^T [M, N] from x [M, K], or, TURNED, of x (W o M) [M, K] from x [M, N].

    P is the side of W that y has, R the other; tiles of W along R are steps. y is [PARTS, M, P].
    """
    P = K if TURNED else N
    # Programs that follow each other share a panel of W.
    pid = tl.program_id(0)
    part = tl.program_id(1)
    tiles_m = tl.cdiv(M, BLOCK_M)
    per_group = GROUP_M * tl.cdiv(P, BLOCK_P)
    first = pid // per_group * GROUP_M
    group = tl.minimum(tiles_m - first, GROUP_M)
    m = (first + pid % per_group % group) * BLOCK_M
    pid_p = pid % per_group // group
    p = pid_p * BLOCK_P

    acc = tl.zeros((BLOCK_P, BLOCK_M), tl.float32)
    # One loop over full tiles, one over mixed ones. The number of a tile is loaded one step ahead:
    # inside its step it would be the address of another load, on which the compiler spends half of
    # its pipeline.
    for mixed in tl.static_range(2):
        count = tl.load(counts_ptr + 2 * pid_p + mixed)
        begin = count * part // PARTS
        end = count * (part + 1) // PARTS
        list_ptr = lists_ptr + (2 * pid_p + mixed).to(tl.int64) * (steps + 1) + begin
        tile = tl.load(list_ptr)
        for i in range(end - begin):
            ahead = tl.load(list_ptr + i + 1)
            acc = multiply_tile(
                acc, x, weight, bits_ptr, m, p, tile * BLOCK_R, M, N, K, words, mixed == 1,
                TURNED, EVEN, EVEN_P, PRECISION, PACKED, TMA, BLOCK_M, BLOCK_P, BLOCK_R,
            )  # fmt: skip
            tile = ahead
    y_ptr += part * tl.cast(M, tl.int64) * P
    if BLOCK_P * BLOCK_M > 128 * 128:
        # In halves: a whole large tile on its way to the other layout fills the registers.
        HALF: tl.constexpr = BLOCK_M // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_P, 2, HALF)), (0, 2, 1)))
        store_tile(tl.trans(left), y_ptr, bias_ptr, m, p, M, P, HAS_BIAS, 0)
        store_tile(tl.trans(right), y_ptr, bias_ptr, m + HALF, p, M, P, HAS_BIAS, 0)
    else:
        store_tile(tl.trans(acc), y_ptr, bias_ptr, m, p, M, P, HAS_BIAS, 0)


def launch(
    x: Tensor, weight: Tensor, mask_bits: Tensor, bias: Tensor | None, tile: Tile | None = None
) -> Tensor:
    """Return y = x (W o M)^T + b.

    x          [M, K] contiguous, float16, bfloat16 or float32
    weight     [N, K] contiguous, dtype of x
    mask_bits  [N, ceil(K / 32)] contiguous int32; bit k % 32 of word k // 32 set = kept
    bias       [N], dtype of x, or None
    tile       block sizes, k and n of them multiples of 32; None takes pick_tile's
    returns    [M, N], accumulated in float32, cast to x.dtype

    float32 as in launch.precision. Deterministic; runs on the current stream, in two kernels, three
    where tile.split cuts the sum. Raises ValueError (shapes, strides, devices), TypeError (dtypes).
    """
    _check("masked_linear", "x", x, weight, mask_bits, weight.shape[-1])
    if bias is not None:
        check_operand("masked_linear", "bias", bias, (weight.shape[0],), x, x.dtype)
    return _multiply("masked_linear", x, weight, mask_bits, bias, tile)


def launch_grad_x(
    grad: Tensor, weight: Tensor, mask_bits: Tensor, tile: Tile | None = None
) -> Tensor:
    """Return grad (W o M) [M, K] for grad [M, N]: the gradient of masked_linear to x.

    Otherwise as launch.
    """
    _check("masked_linear_grad_x", "grad", grad, weight, mask_bits, weight.shape[0])
    return _multiply("masked_linear_grad_x", grad, weight, mask_bits, None, tile)


def _check(op: str, name: str, x: Tensor, weight: Tensor, mask_bits: Tensor, width: int) -> None:
    """Raise unless every address that the kernels form lies inside its tensor."""
    check_dtype(op, "weight", weight)
    N, K = weight.shape
    check_operand(op, "weight", weight, (N, K), x, x.dtype)
    check_operand(op, name, x, (x.shape[0], width), weight, weight.dtype)
    check_operand(op, "mask_bits", mask_bits, (N, cdiv(K, 32)), x, torch.int32)


def _multiply(
    op: str, x: Tensor, weight: Tensor, mask_bits: Tensor, bias: Tensor | None, tile: Tile | None
) -> Tensor:
    turned = op == "masked_linear_grad_x"
    (M, R), (N, K) = x.shape, weight.shape
    P = K if turned else N
    y = x.new_empty(M, P)
    if y.numel() == 0:
        return y
    if R == 0:
        return y.zero_() if bias is None else y.copy_(bias.expand(M, P))
    tile = tile or pick_tile(op, (M, P, R), 1.0, x.dtype, arch_of(x))
    sides = (tile.k, tile.n) if turned else (tile.n, tile.k)
    lists, counts = list_tiles(mask_bits, K, *sides, turned)
    parts = parts_of(tile.split, lists.shape[2] - 1)
    out = y if parts == 1 else x.new_empty(parts, M, P, dtype=torch.float32)
    tma = tile.tma and tma_reads(x) and tma_reads(weight)
    operands = (x, weight)
    if tma:
        boxes = ([tile.m, tile.k], list(sides))
        operands = map(TensorDescriptor.from_tensor, operands, boxes)
    fused = bias if parts == 1 else None
    with torch.cuda.device_of(x):
        masked_product_kernel[(cdiv(M, tile.m) * lists.shape[0], parts)](
            *operands, mask_bits, fused, lists, counts, out, M, N, K, mask_bits.shape[1],
            lists.shape[2] - 1, TURNED=turned, HAS_BIAS=fused is not None,
            # Where nothing depends on it, "even": every value is a compilation.
            EVEN=tma or R % tile.k == 0, EVEN_P=tma or not turned or P % tile.n == 0,
            PRECISION=precision(x.dtype),
            PACKED=x.dtype.itemsize == 2 and not INTERPRETED, TMA=tma, PARTS=parts,
            GROUP_M=_GROUP_M, BLOCK_M=tile.m, BLOCK_P=tile.n, BLOCK_R=tile.k,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    if parts > 1:
        finish(out, y, bias)
    return y
