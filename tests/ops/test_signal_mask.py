"""signal_mask on the CPU: what mass_mask keeps of the signals, the bias among them; errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from liveweight import reference
from liveweight.ops import mass_mask, pack_mask_bits, signal_mask

op = torch.ops.liveweight.signal_mask.default


def layer(N: int, K: int, dtype=torch.float32):
    return torch.randn(N, K).to(dtype), torch.rand(K), torch.randn(N).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ties", ["stable", "authors"])
def test_keeps_what_mass_mask_keeps_of_the_signals(dtype, ties):
    for N, K in [(1, 1), (4, 33), (7, 200), (3, 0), (0, 6)]:
        weight, activity, bias = layer(N, K, dtype)
        rows = torch.cat([weight.float().abs() * activity, bias.float().abs()[:, None]], 1)
        want = mass_mask(rows, 0.9, ties=ties)
        mask, of_bias = signal_mask(weight, activity, bias, alpha=0.9, ties=ties)
        assert torch.equal(mask, want[:, :K])
        assert torch.equal(of_bias, want[:, K])
        bits, again = signal_mask(weight, activity, bias, alpha=0.9, ties=ties, packed=True)
        assert torch.equal(bits, pack_mask_bits(want[:, :K]))
        assert torch.equal(again, of_bias)
        plain = reference.signal_mask(weight, activity, bias, 0.9, ties == "authors", False)
        assert torch.equal(plain[0], mask)
        assert torch.equal(plain[1], of_bias)


def test_without_a_bias():
    weight, activity, _ = layer(5, 40)
    mask, of_bias = signal_mask(weight, activity, alpha=0.7)
    assert of_bias is None
    assert torch.equal(mask, mass_mask(weight.abs() * activity, 0.7))


def test_mean_of_the_signals_of_a_batch():
    module, x = nn.Linear(30, 8), torch.randn(100, 30)
    signal = (module.weight[None] * x[:, None]).abs().mean(0).double()  # [8, 30]
    bias = module.bias.detach().abs().double()
    mask, of_bias = signal_mask(module.weight, x.abs().mean(0), module.bias, alpha=0.8)
    kept = (signal * mask).sum(1) + bias * of_bias
    assert (kept >= 0.8 * (signal.sum(1) + bias) * (1 - 1e-6)).all()
    assert mask.sum() < mask.numel()


def test_opcheck_and_compile():
    weight, activity, bias = layer(5, 17)
    for given in (bias, None):
        torch.library.opcheck(op, (weight, activity, given, 0.9, False, True))

    def prune(weight):
        return signal_mask(weight, activity, bias, alpha=0.9)

    compiled = torch.compile(prune, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(weight), prune(weight), strict=True):
        assert torch.equal(got, want)


def test_wrong_arguments():
    weight, activity, bias = layer(3, 4)
    with pytest.raises(TypeError, match="weight must be float32, bfloat16, float16, got float64"):
        signal_mask(weight.double(), activity, alpha=0.5)
    with pytest.raises(TypeError, match="activity must be float32, got float16"):
        signal_mask(weight, activity.half(), alpha=0.5)
    with pytest.raises(ValueError, match=r"expected activity \[4\] for weight \(3, 4\), got \(3,"):
        signal_mask(weight, activity[:3], alpha=0.5)
    with pytest.raises(ValueError, match=r"expected bias \[3\], got \(4,\)"):
        signal_mask(weight, activity, activity, alpha=0.5)
    with pytest.raises(TypeError, match="expected bias float32, got float16"):
        signal_mask(weight, activity, bias.half(), alpha=0.5)
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got -1"):
        signal_mask(weight, activity, alpha=-1)
    with pytest.raises(ValueError, match='ties must be "stable" or "authors", got 0'):
        signal_mask(weight, activity, alpha=0.5, ties=0)
    weight[1, 2] = float("nan")
    with pytest.raises(
        ValueError, match=r"signal_mask: .weight. . activity must be .*, row 1 holds"
    ):
        signal_mask(weight, activity, alpha=0.5)
