"""Response norms against brute force: one convolution per kernel, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from liveweight.prune import NNRelief, kernel_response, score
from liveweight.prune.kernel_response import (
    MeanKernelNorms,
    kernel_norms,
    output_positions,
    weight_norms,
)

# An even kernel with padding="same" makes torch warn about a copy.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

CONVS = {
    "plain": (3, 4, 3),
    "strided": (3, 4, 3, 2, 1),
    "dilated": (2, 3, 3, 1, 2, 2),
    "grouped": (4, 6, 3, 1, 1, 1, 2),
    "depthwise": (4, 8, 3, 1, 0, 1, 4),
    "oblong": (2, 3, (2, 5), (1, 2), (1, 0)),
    "same": (2, 3, (3, 4), 1, "same"),
    "circular": (2, 2, 3, 1, 1, 1, 1, True, "circular"),
    "pointwise": (5, 2, 1),
}  # arguments of nn.Conv2d


@pytest.fixture
def fused(monkeypatch):
    """Take the path of CUDA tensors; its ops run their references on a CPU."""
    monkeypatch.setattr(kernel_response, "_is_fused", lambda conv, x: True)


@pytest.fixture(params=CONVS)
def conv(request):
    torch.manual_seed(3)
    return nn.Conv2d(*CONVS[request.param])


def response(conv, x, o, i):
    """|k_oi| * x_c for the c-th input map that kernel (o, i) reads: float64 [N, h, w]."""
    per_group = conv.in_channels // conv.groups
    group = o // (conv.out_channels // conv.groups)
    one = nn.Conv2d(
        1, 1, conv.kernel_size, conv.stride, conv.padding, conv.dilation, bias=False,
        padding_mode=conv.padding_mode,
    ).double()  # fmt: skip
    with torch.no_grad():
        one.weight.copy_(conv.weight[o : o + 1, i : i + 1].abs())
        channel = group * per_group + i
        return one(x[:, channel : channel + 1].double().abs())[:, 0]


def brute(conv, x, measure):
    shape = conv.weight.shape[:2]
    return torch.tensor(
        [
            [float(measure(response(conv, x, o, i))) for i in range(shape[1])]
            for o in range(shape[0])
        ],
        dtype=torch.float64,
    )


@pytest.mark.parametrize("norm", ["fro", "l1"])
def test_kernel_norms_of_the_mean_map(conv, norm):
    x = torch.randn(5, conv.in_channels, 9, 8)
    mean = x.double().abs().mean(0)
    expected = brute(conv, mean[None], (lambda r: r.norm()) if norm == "fro" else lambda r: r.sum())
    found = kernel_norms(conv, conv.weight.detach(), mean, norm)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_fused_norms_of_the_mean_map(conv, fused):
    mean = torch.rand(conv.in_channels, 9, 8, dtype=torch.float64)
    found = kernel_norms(conv, conv.weight.detach(), mean, "fro")
    torch.testing.assert_close(found, brute(conv, mean[None], torch.norm), rtol=1e-6, atol=0)


@pytest.mark.parametrize("chunk", [1, 64 << 20])
def test_fused_and_unfolded_means_of_the_norms_are_one_number(conv, monkeypatch, chunk):
    x, means = torch.randn(11, conv.in_channels, 9, 8), []
    monkeypatch.setattr(kernel_response, "_CHUNK_BYTES", chunk)
    for fused in (False, True):
        monkeypatch.setattr(kernel_response, "_is_fused", lambda conv, x, fused=fused: fused)
        seen = MeanKernelNorms(conv)
        for part in (x[:4], x[4:10], x[10]):
            seen.update(part)
        assert seen.samples == 11 and seen.shape == (conv.in_channels, 9, 8)
        means.append(seen.mean)
    torch.testing.assert_close(means[1], means[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_fused_norms_of_other_dtypes(fused, dtype):
    conv, x = nn.Conv2d(3, 4, 3).to(dtype), torch.randn(5, 3, 7, 6).to(dtype)
    seen = MeanKernelNorms(conv)
    seen.update(x)
    wide = nn.Conv2d(3, 4, 3)
    wide.load_state_dict({k: v.float() for k, v in conv.state_dict().items()})
    want = brute(wide, x, lambda r: r.flatten(1).norm(dim=1).mean())
    torch.testing.assert_close(seen.mean, want, rtol=1e-5, atol=0)


@pytest.mark.gpu
def test_norms_on_a_gpu_are_those_of_a_cpu(conv, gpu):
    x = torch.randn(6, conv.in_channels, 9, 8)
    seen = MeanKernelNorms(conv)
    seen.update(x)
    want = seen.mean
    mean = x.double().abs().mean(0)
    want_of_mean = kernel_norms(conv, conv.weight.detach(), mean, "fro")
    conv = conv.to(gpu)
    for layout in (torch.contiguous_format, torch.channels_last):
        seen = MeanKernelNorms(conv)
        seen.update(x.to(gpu, memory_format=layout))
        torch.testing.assert_close(seen.mean.cpu(), want, rtol=1e-5, atol=0)
    got = kernel_norms(conv, conv.weight.detach(), mean.to(gpu), "fro")
    torch.testing.assert_close(got.cpu(), want_of_mean, rtol=1e-5, atol=0)


def test_output_positions(conv):
    x = torch.randn(1, conv.in_channels, 9, 8)
    assert output_positions(conv, (conv.in_channels, 9, 8)) == conv(x)[0, 0].numel()


@pytest.mark.parametrize("variant", ["authors", "paper"])
def test_scores_and_bias_of_a_convolution(conv, variant):
    x = torch.randn(70, conv.in_channels, 9, 8)
    importance = NNRelief(variant=variant)
    model = nn.Sequential(conv)
    scores = score(model, [x[:30], x[30:]], importance=importance)
    if variant == "paper":
        raw = brute(conv, x, lambda r: r.flatten(1).norm(dim=1).mean())
    else:
        raw = brute(conv, x.double().abs().mean(0)[None], lambda r: r.norm())
    bias = conv.bias.detach().double().abs() * conv(x)[0, 0].numel() ** 0.5
    total = raw.sum(1) + bias
    torch.testing.assert_close(scores["0"].double(), raw / total[:, None], rtol=2e-6, atol=0)
    torch.testing.assert_close(scores.bias["0"].double(), bias / total, rtol=2e-6, atol=0)
    torch.testing.assert_close(scores["0"].sum(1) + scores.bias["0"], torch.ones(conv.out_channels))


def test_l1_is_the_same_number_in_both_variants(conv):
    data = [torch.randn(6, conv.in_channels, 9, 8)]
    authors, paper = (
        score(nn.Sequential(conv), data, importance=NNRelief(variant=v, norm="l1"))
        for v in ("authors", "paper")
    )
    assert torch.equal(authors["0"], paper["0"])


@pytest.mark.parametrize("norm", ["fro", "l1"])
def test_single_weights_score_their_own_response(norm):
    conv = nn.Conv2d(2, 3, 3, stride=2, padding=1)
    mean = torch.rand(2, 7, 7, dtype=torch.float64)
    found = weight_norms(conv, conv.weight.detach(), mean, norm)
    assert found.shape == conv.weight.shape
    lone = torch.zeros_like(conv.weight)
    lone[1, 0, 2, 1] = conv.weight[1, 0, 2, 1].detach()
    expected = kernel_norms(conv, lone, mean, norm)[1, 0]
    torch.testing.assert_close(found[1, 0, 2, 1], expected, rtol=1e-6, atol=0)


def test_the_paper_variant_scores_in_chunks(monkeypatch):
    conv, x = nn.Conv2d(3, 4, 3), torch.randn(9, 3, 6, 6)
    importance = NNRelief(variant="paper")
    whole = score(nn.Sequential(conv), [x], importance=importance)["0"]
    monkeypatch.setattr("liveweight.prune.kernel_response._CHUNK_BYTES", 1)
    torch.testing.assert_close(score(nn.Sequential(conv), [x], importance=importance)["0"], whole)


def test_the_norm_of_the_mean_is_at_most_the_mean_of_the_norms():
    conv, x = nn.Conv2d(3, 4, 3, bias=False), F.relu(torch.randn(20, 3, 8, 8))
    mean_map = x.double().mean(0)
    fast = kernel_norms(conv, conv.weight.detach(), mean_map, "fro")
    slow = brute(conv, x, lambda r: r.flatten(1).norm(dim=1).mean())
    assert (fast <= slow * (1 + 1e-6)).all()


def test_the_masks_of_the_two_variants_nearly_agree():
    torch.manual_seed(0)
    conv, x = nn.Conv2d(16, 32, 3, padding=1), F.relu(torch.randn(64, 16, 8, 8))
    kept = []
    for variant in ("authors", "paper"):
        s = score(nn.Sequential(conv), [x], importance=NNRelief(variant=variant))["0"]
        order = s.sort(1, descending=True)
        keep = torch.zeros_like(s, dtype=torch.bool)
        keep.scatter_(1, order.indices, order.values.cumsum(1) < 0.95)
        kept.append(keep)
    assert (kept[0] == kept[1]).double().mean() > 0.98
