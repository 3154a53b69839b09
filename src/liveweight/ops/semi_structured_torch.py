"""PyTorch's own semi-structured (2:4) products on GPUs: cuSPARSELt and CUTLASS."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from liveweight import _library
from liveweight.formats import semi_structured
from liveweight.reference import apply_activation

CUSPARSELT, CUTLASS = "cusparselt", "cutlass"
# Each side of the weight, and the tokens, must be a multiple of these; operands are padded to them.
MULTIPLES = {CUSPARSELT: (16, 16, 8), CUTLASS: (32, 64, 8)}
_SLOW_ON_HOPPER = 800  # cuSPARSELt 0.8.0

_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # by the values of a weight
_algorithms: dict[tuple, int] = {}
_seen: set[tuple] = set()


@torch.compiler.assume_constant_result
def find_backend(device: int) -> str | None:
    """Return the backend that PyTorch has for 2:4 products on a CUDA device, or None.

    cuSPARSELt where PyTorch was built with it; CUTLASS, which PyTorch compiles for compute
    capability 8.x alone. Warns about cuSPARSELt 0.8.0 on compute capability 9.x.
    """
    return _find_backend(device)


@functools.lru_cache
def _find_backend(device: int) -> str | None:
    major, minor = divmod(_library.capability(device), 10)
    if major < 8:
        return None
    if torch.backends.cusparselt.is_available():
        version = torch.backends.cusparselt.version()
        if version == _SLOW_ON_HOPPER and major == 9:
            warnings.warn(
                f"cuSPARSELt {version_text(version)} of torch {torch.__version__} is slower on "
                f"compute capability {major}.{minor} than other versions; 2:4 products of many "
                "tokens suffer",
                stacklevel=2,
            )
        return CUSPARSELT
    return CUTLASS if major == 8 else None


def version_text(version: int) -> str:
    """Return cuSPARSELt's version as its makers write it: 702 as "0.7.2"."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def describe_backend(device: int) -> str:
    """Return the backend for 2:4 products of many tokens on a device with its version."""
    backend = find_backend(device)
    if backend == CUSPARSELT:
        return f"cuSPARSELt {version_text(torch.backends.cusparselt.version())}"
    return "none" if backend is None else f"CUTLASS of torch {torch.__version__}"


def torch_linear(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    out_features: int,
    bias: Tensor | None,
    activation: int,
    batch_last: bool,
    backend: str,
) -> Tensor:
    """Return act(x W^T + bias) [M, N] for x [M, K] by a backend of PyTorch; checks its operands."""
    tokens, shape = x.shape[0], (out_features, x.shape[1])
    _check(x, values, shape, backend)
    if min(*shape, tokens) == 0:
        y = x.new_zeros(tokens, out_features)
        y = apply_activation(y if bias is None else y + bias, activation)
        return y.t().contiguous().t() if batch_last else y
    packed = packed_for(backend, values, meta, shape)
    rows, columns, least = MULTIPLES[backend]
    x = pad_to(x, least, columns)
    bias = None if bias is None else functional.pad(bias, (0, -bias.shape[0] % rows))
    run = _run_cusparselt if backend == CUSPARSELT else _run_cutlass
    y = run(x, packed, bias, batch_last)[:tokens, :out_features]
    y = apply_activation(y, activation)
    return y.t().contiguous().t() if batch_last else y.contiguous()


def _check(x: Tensor, values: Tensor, shape: tuple[int, int], backend: str) -> None:
    """Raise TypeError or ValueError unless a backend can multiply these."""
    op = "semi_structured_torch_linear"
    if backend not in MULTIPLES:
        raise ValueError(f"{op}: backend must be {CUSPARSELT!r} or {CUTLASS!r}, got {backend!r}")
    if x.dtype not in (torch.bfloat16, torch.float16) or values.dtype != x.dtype:
        raise TypeError(
            f"{op}: x and values must both be bfloat16 or float16, got {x.dtype} and {values.dtype}"
        )
    if semi_structured.tiles_of(shape) != tuple(values.shape[:2]):
        raise ValueError(f"{op}: values {tuple(values.shape)} hold no weight of shape {shape}")


def _run_cusparselt(
    x: Tensor, packed: tuple[Tensor, ...], bias: Tensor | None, batch_last: bool
) -> Tensor:
    """Return x W^T + bias [M, N]; its transpose is contiguous with batch_last."""
    options = {"bias": bias, "transpose_result": not batch_last}
    algorithm = find_algorithm(packed[0], x, options)
    y = torch._cslt_sparse_mm(packed[0], x.t(), alg_id=algorithm, **options)
    return y.t() if batch_last else y


def _run_cutlass(
    x: Tensor, packed: tuple[Tensor, ...], bias: Tensor | None, batch_last: bool
) -> Tensor:
    """Return x W^T + bias [M, N]; its transpose is contiguous."""
    if bias is None:
        return torch._sparse_semi_structured_mm(*packed, x.t()).t()
    return torch._sparse_semi_structured_addmm(bias, *packed, x.t()).t()


def find_algorithm(packed: Tensor, x: Tensor, options: dict) -> int:
    """Return cuSPARSELt's fastest algorithm for these operands, searched once for each shape.

    The search runs the product many times. It waits until a shape is seen a second time, so that
    lengths that never come again do not pay for it, and never runs while a CUDA graph is captured;
    until then the library's default, 0, serves.
    """
    flags = (options["bias"] is None, options["transpose_result"])
    key = (tuple(packed.shape), tuple(x.shape), x.dtype, x.device, *flags)
    if key in _algorithms:
        return _algorithms[key]
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return 0
    if key not in _seen:
        _seen.add(key)
        return 0
    _algorithms[key] = torch._cslt_sparse_mm_search(packed, x.t(), **options)
    return _algorithms[key]


def packed_for(
    backend: str, values: Tensor, meta: Tensor, shape: tuple[int, int]
) -> tuple[Tensor, ...]:
    """Return a weight as a backend stores it, kept as long as its values live unchanged.

    Tensors made under inference mode do not tell when they change: packed at every call.
    """
    if values.is_inference() or meta.is_inference():
        return pack_for(backend, values, meta, shape)
    now = (backend, values._version, meta._version, tuple(shape))
    known = _packed.get(values)
    if known is None or known[0] != now or known[1] is not meta:
        if values.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "semi_structured_torch_linear: the first call with a weight packs it, which a CUDA "
                "graph would only do when it is replayed: make one call before capturing"
            )
        known = (now, meta, pack_for(backend, values, meta, shape))
        _packed[values] = known
    return known[2]


def pack_for(
    backend: str, values: Tensor, meta: Tensor, shape: tuple[int, int]
) -> tuple[Tensor, ...]:
    """Return a weight as a backend stores it: cuSPARSELt's one tensor, or CUTLASS's two."""
    rows, columns, _ = MULTIPLES[backend]
    if backend == CUSPARSELT:
        dense = torch.ops.liveweight.semi_structured_to_dense(values.detach(), meta, shape)
        # Its compression would take a -0 for a stored weight.
        return (torch._cslt_compress(pad_to(dense.masked_fill_(dense == 0, 0), rows, columns)),)
    height, width = -(-shape[0] // rows) * rows, -(-shape[1] // columns) * columns
    pairs = semi_structured.read_values(values.detach())
    codes = semi_structured.read_codes(meta)
    pairs = functional.pad(pairs, (0, 0, 0, 0, 0, height - len(pairs)))[:, : width // 4]
    codes = functional.pad(codes, (0, 0, 0, height - len(codes)), value=semi_structured.CODES[0])
    return pairs.reshape(height, -1).contiguous(), interleave(codes[:, : width // 4])


def interleave(codes: Tensor) -> Tensor:
    """Return index pairs [N, K / 4] uint8 as CUTLASS stores them: int16 [N, K / 16].

    A word holds the pairs of 16 columns. Of a tile of 32 rows x 32 columns, rows g, g + 8, g + 16
    and g + 24 lie side by side: (g, first word), (g + 8, first), (g, second), (g + 8, second), then
    the other two rows likewise; tiles of 32 columns follow each other with all their rows.
    """
    N, groups = codes.shape
    shifts = 4 * torch.arange(4, dtype=torch.int32, device=codes.device)
    words = (codes.reshape(N, groups // 4, 4).int() << shifts).sum(-1, dtype=torch.int32)
    # tile, high (16 rows), row of a pair (8 rows), g, columns, word
    axes = words.to(torch.int16).reshape(N // 32, 2, 2, 8, groups // 8, 2)
    return axes.permute(4, 0, 3, 1, 5, 2).reshape(N, groups // 4)


def pad_to(x: Tensor, rows: int, columns: int) -> Tensor:
    """Return x with zeros below and beside it, its sides multiples of rows and columns."""
    below, beside = -x.shape[0] % rows, -x.shape[1] % columns
    return functional.pad(x, (0, beside, 0, below)) if below or beside else x


_library.register_torch("semi_structured_torch_linear", torch_linear)
