"""patch_gram and gram_norms_: values, shapes and messages of the public functions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from liveweight.ops import gram_norms_, patch_gram

WINDOWS = {
    "plain": {"kernel_size": 3},
    "same": {"kernel_size": 3, "padding": 1},
    "oblong": {"kernel_size": (2, 5), "stride": (1, 2), "padding": (1, 0)},
    "one side": {"kernel_size": (2, 4), "padding": (0, 1, 1, 2)},
    "dilated": {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": (1, 2)},
    "pointwise": {"kernel_size": 1, "stride": 2},
}


def slow(x: torch.Tensor, kernel_size, stride=1, padding=0, dilation=1) -> torch.Tensor:
    """The Gram matrix from each tap's own picture: [N, C, T, T] in float64."""
    kh, kw = kernel_size if isinstance(kernel_size, tuple) else (kernel_size,) * 2
    sides = padding if isinstance(padding, tuple) else (padding, padding)
    top, bottom, left, right = sides if len(sides) == 4 else (sides[0],) * 2 + (sides[1],) * 2
    padded = F.pad(x.double().abs(), (left, right, top, bottom))
    channels, pictures = x.shape[1], []
    for tap in range(kh * kw):
        one = torch.zeros(channels, 1, kh * kw, dtype=torch.float64)
        one[:, :, tap] = 1
        one = one.unflatten(2, (kh, kw))
        picture = F.conv2d(padded, one, None, stride, 0, dilation, channels)
        pictures.append(picture.flatten(2))
    u = torch.stack(pictures, 2)  # [N, C, T, P]
    return u @ u.transpose(2, 3)


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_patch_gram_is_the_gram_matrix_of_the_taps_pictures(window):
    x = torch.randn(3, 2, 9, 8)
    want = slow(x, **window)
    row, column = torch.triu_indices(want.shape[2], want.shape[2])
    got = patch_gram(x, **window)
    torch.testing.assert_close(got.double(), want[..., row, column], rtol=1e-5, atol=0)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_gram_norms_are_the_norms_of_the_responses(window, groups):
    x = torch.randn(3, 4, 9, 8)
    gram = slow(x, **window)
    taps = gram.shape[2]
    weight = torch.randn(8, 4 // groups, taps)
    sums = torch.ones(8, 4 // groups, dtype=torch.float64)
    want = sums.clone()
    for o in range(8):
        for i in range(4 // groups):
            k, c = weight[o, i].double().abs(), o // (8 // groups) * (4 // groups) + i
            want[o, i] += sum(float(k @ gram[n, c] @ k) ** 0.5 for n in range(3))
    assert gram_norms_(sums, patch_gram(x, **window), weight) is sums
    torch.testing.assert_close(sums, want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_added_up_in_float32(dtype):
    x = torch.randn(2, 3, 9, 8).to(dtype)
    got = patch_gram(x, 3)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, patch_gram(x.float(), 3))
    weight = torch.randn(5, 3, 3, 3).to(dtype)
    sums, wide = torch.zeros(2, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(
        gram_norms_(sums, got, weight), gram_norms_(wide, got, weight.float())
    )


def test_any_layout_is_read():
    x = torch.randn(2, 3, 9, 8)
    want = patch_gram(x, 3)
    assert torch.equal(patch_gram(x.to(memory_format=torch.channels_last), 3), want)
    assert torch.equal(patch_gram(torch.stack([x, -x], -1)[..., 1], 3), want)


def test_nothing_gives_nothing():
    assert patch_gram(torch.empty(0, 3, 5, 5), 3).shape == (0, 3, 45)
    sums = torch.ones(4, 3, dtype=torch.float64)
    gram_norms_(sums, torch.empty(0, 3, 45), torch.randn(4, 3, 3, 3))
    assert torch.equal(sums, torch.ones(4, 3, dtype=torch.float64))


def test_opcheck():
    x = torch.randn(2, 4, 6, 5)
    gram_op = torch.ops.liveweight.patch_gram.default
    torch.library.opcheck(gram_op, (x, [3, 3], [1, 1], [1, 1, 1, 1], [1, 1]))
    sums = torch.zeros(6, 2, dtype=torch.float64)
    norms_op = torch.ops.liveweight.gram_norms_.default
    torch.library.opcheck(norms_op, (sums, patch_gram(x, 3), torch.randn(6, 2, 9)))


def test_compiles_into_one_graph():
    def step(sums, x, weight):
        gram_norms_(sums, patch_gram(x.relu(), 3, padding=1), weight)
        return sums * 2

    x, weight = torch.randn(2, 4, 6, 5), torch.randn(6, 4, 3, 3, requires_grad=True)
    sums, eager = torch.zeros(2, 6, 4, dtype=torch.float64)
    wanted = step(eager, x, weight)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(sums, x, weight)
    assert torch.equal(got, wanted)
    assert not got.requires_grad


def test_wrong_arguments_of_patch_gram():
    x = torch.randn(2, 3, 5, 6)
    with pytest.raises(TypeError, match="x must be float32, bfloat16, float16, got float64"):
        patch_gram(x.double(), 3)
    with pytest.raises(ValueError, match="x must have 4 dimensions"):
        patch_gram(x[0], 3)
    with pytest.raises(ValueError, match="kernel_size must be >= 1, got 0"):
        patch_gram(x, 0)
    with pytest.raises(ValueError, match="at most 128 taps, got 12 x 12"):
        patch_gram(x, 12)
    with pytest.raises(
        ValueError, match="a window of 4 with dilation 2 does not fit into 5 padded"
    ):
        patch_gram(x, (4, 1), dilation=2)
    with pytest.raises(ValueError, match="padding must be whole numbers >= 0"):
        patch_gram(x, 3, padding=(1, 1, -1, 0))
    with pytest.raises(ValueError, match="stride must be >= 1, got 0"):
        patch_gram(x, 3, stride=0)


def test_wrong_arguments_of_gram_norms():
    sums = torch.zeros(6, 2, dtype=torch.float64)
    gram, weight = torch.rand(3, 4, 45), torch.randn(6, 2, 3, 3)
    with pytest.raises(TypeError, match="sums must be float64, got float32"):
        gram_norms_(sums.float(), gram, weight)
    with pytest.raises(ValueError, match="gram of 6 taps must have 21 entries, got 45"):
        gram_norms_(sums, gram, weight[..., :2])
    with pytest.raises(ValueError, match="does not belong to gram's 3 channels"):
        gram_norms_(sums, gram[:, :3], weight)
    with pytest.raises(ValueError, match=r"sums must be \[6, 2\], got \[2, 6\]"):
        gram_norms_(sums.t(), gram, weight)
    with pytest.raises(ValueError, match="sums must be contiguous"):
        gram_norms_(torch.zeros(2, 6, dtype=torch.float64).t(), gram, weight)
    assert sums.count_nonzero() == 0
