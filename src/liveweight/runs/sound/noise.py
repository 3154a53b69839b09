"""Noise behind speech: white and babble, at a given ratio of signal to noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def mix(wave: Tensor, noise: Tensor, snr: float) -> Tensor:
    """Return wave + g noise, g such that the ratio of their mean squares is `snr` decibels.

        g^2 = mean(wave^2) / (mean(noise^2) 10^(snr / 10))

    wave, noise   float [samples] of the same length; a silent wave stays silent
    Raises ValueError for lengths that differ and noise that is zero.
    """
    if wave.shape != noise.shape:
        raise ValueError(f"mix: wave is {list(wave.shape)}, noise {list(noise.shape)}")
    power = noise.square().mean()
    if not float(power) > 0:
        raise ValueError("mix: the noise is zero")
    return wave + noise * (wave.square().mean() / (power * 10 ** (snr / 10))).sqrt()


def white(samples: int, generator: torch.Generator) -> Tensor:
    """Return Gaussian white noise: float32 [samples]."""
    return torch.randn(samples, generator=generator)


def babble(
    waves: Sequence[Tensor], samples: int, generator: torch.Generator, voices: int = 6
) -> Tensor:
    """Return several voices at once, each at mean square 1: float32 [samples].

    A voice is recordings drawn from `waves`, one behind the other, from a place drawn in the first.
    Raises ValueError for no waves and voices < 1.
    """
    if not waves or voices < 1:
        raise ValueError(f"babble: expected waves and voices, got {len(waves)} and {voices}")
    total = torch.zeros(samples)
    for _ in range(voices):
        first = waves[_draw(len(waves), generator)]
        parts = [first[_draw(len(first), generator) :]]
        while sum(map(len, parts)) < samples:
            parts.append(waves[_draw(len(waves), generator)])
        voice = torch.cat(parts)[:samples]
        total += voice / voice.square().mean().sqrt().clamp_min(1e-8)
    return total


def _draw(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))
