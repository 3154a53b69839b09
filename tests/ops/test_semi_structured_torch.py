"""PyTorch's 2:4 backends, by fakes that check what the libraries ask for: no GPU runs them here."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

from liveweight import _library
from liveweight.formats import SemiStructured
from liveweight.ops import semi_structured_torch as backends

SHAPES = [(1, 16, 64), (5, 33, 130), (8, 32, 128), (70, 90, 300)]


def two_of_four(N: int, K: int) -> torch.Tensor:
    order = torch.rand(N, -(-K // 4), 4).argsort(-1)
    return (torch.randn(N, K) * (order < 2).flatten(1)[:, :K]).bfloat16()


class Library:
    """cuSPARSELt and CUTLASS as torch offers them, on the CPU: same operands, same refusals."""

    def __init__(self, monkeypatch):
        self.compressed = self.searched = 0
        self.algorithms: list[int] = []
        for name in ("_cslt_compress", "_cslt_sparse_mm", "_cslt_sparse_mm_search"):
            monkeypatch.setattr(torch, name, getattr(self, name))
        monkeypatch.setattr(torch, "_sparse_semi_structured_mm", self.cutlass)
        monkeypatch.setattr(
            torch,
            "_sparse_semi_structured_addmm",
            lambda bias, *operands: self.cutlass(*operands) + bias.view(-1, 1),
        )
        for known in (backends._algorithms, backends._seen, backends._packed):
            known.clear()

    def _cslt_compress(self, dense):
        assert dense.is_contiguous() and dense.dim() == 2
        assert dense.shape[0] % 16 == 0 and dense.shape[1] % 16 == 0
        assert not (dense.signbit() & (dense == 0)).any(), "-0 takes the place of a weight"
        self.compressed += 1
        self.dense = dense
        return torch.full((dense.numel() // 16 * 9,), 7, dtype=dense.dtype)

    def _check(self, packed, x, bias):
        assert packed.dim() == 1 and float(packed[0]) == 7
        assert x.shape[0] == self.dense.shape[1] and x.shape[1] % 8 == 0
        assert x.t().is_contiguous() and x.dtype == self.dense.dtype
        assert bias is None or bias.shape == (self.dense.shape[0],)

    def _cslt_sparse_mm(self, packed, x, *, bias, transpose_result, alg_id):
        self._check(packed, x, bias)
        self.algorithms.append(alg_id)
        y = F.linear(x.t().float(), self.dense.float(), None if bias is None else bias.float())
        y = y.to(x.dtype)
        return y if transpose_result else y.t().contiguous()

    def _cslt_sparse_mm_search(self, packed, x, *, bias, transpose_result):
        self._check(packed, x, bias)
        self.searched += 1
        return 40 + self.searched

    def cutlass(self, pairs, meta, x):
        N, K = pairs.shape[0], 2 * pairs.shape[1]
        assert pairs.is_contiguous() and meta.is_contiguous()
        assert N % 32 == 0 and K % 64 == 0 and meta.shape == (N, K // 16)
        assert meta.dtype == torch.int16 and x.shape[0] == K and x.shape[1] % 8 == 0
        self.compressed += 1
        return (sparse_semi_structured_to_dense_cutlass(pairs, meta).float() @ x.float()).to(
            x.dtype
        )


@pytest.fixture
def library(monkeypatch) -> Library:
    return Library(monkeypatch)


@pytest.mark.parametrize("backend", backends.MULTIPLES)
@pytest.mark.parametrize("M,N,K", SHAPES)
def test_operands_are_padded_and_results_cut(library, M, N, K, backend):
    weight, x, bias = two_of_four(N, K), torch.randn(M, K).bfloat16(), torch.randn(N).bfloat16()
    packed = SemiStructured.from_dense(weight)
    for b in (None, bias):
        for batch_last in (False, True):
            got = backends.torch_linear(x, packed.values, packed.meta, N, b, 1, batch_last, backend)
            want = F.relu(F.linear(x.double(), weight.double(), None if b is None else b.double()))
            torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=2e-2)
            assert got.shape == (M, N) and (got.t() if batch_last else got).is_contiguous()


def test_empty_operands_ask_no_library(library):
    for M, N, K in [(0, 4, 8), (3, 0, 8), (3, 4, 0)]:
        packed = SemiStructured.from_dense(torch.zeros(N, K, dtype=torch.float16))
        bias = torch.ones(N, dtype=torch.float16)
        got = backends.torch_linear(
            torch.ones(M, K, dtype=torch.float16),
            packed.values,
            packed.meta,
            N,
            bias,
            0,
            False,
            "cusparselt",
        )
        assert torch.equal(got, bias.expand(M, N))
    assert library.compressed == 0


def test_the_algorithm_is_searched_when_a_shape_returns(library):
    packed = SemiStructured.from_dense(two_of_four(32, 64))
    parts = (packed.values, packed.meta, 32, None, 0, False, "cusparselt")
    for M in (8, 16, 8, 8, 16, 7):
        backends.torch_linear(torch.randn(M, 64).bfloat16(), *parts)
    # 7 tokens are padded to 8.
    assert library.algorithms == [0, 0, 41, 41, 42, 41]
    assert library.searched == 2


def test_a_weight_is_packed_once_and_again_when_it_changes(library):
    packed = SemiStructured.from_dense(two_of_four(32, 64))
    x = torch.randn(8, 64).bfloat16()
    parts = (packed.values, packed.meta, 32, None, 0, False, "cusparselt")
    for _ in range(3):
        backends.torch_linear(x, *parts)
    assert library.compressed == 1
    before = backends.torch_linear(x, *parts)
    with torch.no_grad():
        packed.values.mul_(2)
    torch.testing.assert_close(backends.torch_linear(x, *parts), 2 * before)
    assert library.compressed == 2
    packed.meta.add_(0)
    backends.torch_linear(x, *parts)
    assert library.compressed == 3
    assert len(backends._packed) == 1
    del packed, parts
    assert len(backends._packed) == 0  # nothing of a weight outlives it


def test_values_of_inference_mode_are_packed_at_every_call(library):
    with torch.inference_mode():
        packed = SemiStructured.from_dense(two_of_four(32, 64))
        parts = (packed.values, packed.meta, 32, None, 0, False, "cusparselt")
        for _ in range(2):
            backends.torch_linear(torch.randn(8, 64).bfloat16(), *parts)
    assert library.compressed == 2


@pytest.mark.parametrize(
    "capability,version,backend",
    [(75, 702, None), (80, None, "cutlass"), (90, None, None), (80, 702, "cusparselt"),
     (90, 702, "cusparselt"), (90, 800, "cusparselt"), (100, 800, "cusparselt")],
)  # fmt: skip
def test_the_backend_follows_gpu_and_version(monkeypatch, recwarn, capability, version, backend):
    monkeypatch.setattr(_library, "capability", lambda index: capability)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: version is not None)
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: version)
    backends._find_backend.cache_clear()
    try:
        assert backends.find_backend(0) == backend
        text = backends.describe_backend(0)
        # Compiled graphs take it for a constant.
        compiled = torch.compile(
            lambda x: x if backends.find_backend(0) == backend else -x,
            fullgraph=True,
            backend="eager",
        )
        assert torch.equal(compiled(torch.ones(2)), torch.ones(2))
    finally:
        backends._find_backend.cache_clear()
    warned = [str(w.message) for w in recwarn if "cuSPARSELt" in str(w.message)]
    assert bool(warned) == (version == 800 and capability == 90)
    assert not warned or "cuSPARSELt 0.8.0" in warned[0] and "9.0" in warned[0]
    known = {"cusparselt": "cuSPARSELt 0.", "cutlass": "CUTLASS of torch ", None: "none"}
    assert text.startswith(known[backend])


def test_messages(library):
    packed = SemiStructured.from_dense(two_of_four(32, 64))
    x, parts = torch.randn(8, 64).bfloat16(), (packed.values, packed.meta)
    with pytest.raises(ValueError, match="backend must be 'cusparselt' or 'cutlass', got 'cublas'"):
        backends.torch_linear(x, *parts, 32, None, 0, False, "cublas")
    with pytest.raises(TypeError, match="bfloat16 or float16, got torch.float32 and torch.bf"):
        backends.torch_linear(x.float(), *parts, 32, None, 0, False, "cutlass")
    with pytest.raises(ValueError, match=r"hold no weight of shape \(32, 200\)"):
        backends.torch_linear(torch.ones(8, 200).bfloat16(), *parts, 32, None, 0, False, "cutlass")


@pytest.mark.gpu
@pytest.mark.parametrize("M,N,K", [*SHAPES, (300, 512, 1024)])
def test_gpu_backend(gpu, M, N, K):
    backend = backends.find_backend(gpu.index or 0)
    if backend is None:
        pytest.skip("torch has no 2:4 backend for this GPU")
    weight, x = two_of_four(N, K).to(gpu), torch.randn(M, K, device=gpu).bfloat16()
    packed, bias = SemiStructured.from_dense(weight), torch.randn(N, device=gpu).bfloat16()
    want = F.relu(F.linear(x.double(), weight.double(), bias.double()))
    for batch_last in (False, True):
        for _ in range(3):  # the default, the search, and what it found
            got = torch.ops.liveweight.semi_structured_torch_linear(
                x, packed.values, packed.meta, N, bias, 1, batch_last, backend
            )
            torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=0.1)
