"""Log-mel features: what a small network hears of a wave."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

_LEAST_DEVIATION = 1e-3  # a band that does not move is left at 0


def power_spectrum(wave: Tensor, window: Tensor, hop: int) -> Tensor:
    """Return the short-time power spectrum of a wave.

        P[t, k] = |sum_n window_n wave_{t hop + n} exp(-2 pi i k n / L)|^2

    wave     float [samples]; zeros are added up to one window, a tail shorter than hop is left out
    window   float [n]; L is the least power of two from n on
    result   float [1 + (samples - n) // hop, L / 2 + 1]
    """
    size = len(window)
    if len(wave) < size:
        wave = torch.nn.functional.pad(wave, (0, size - len(wave)))
    spectrum = torch.fft.rfft(wave.unfold(0, size, hop) * window, n=fft_size(size))
    return spectrum.real.square() + spectrum.imag.square()


def fft_size(samples: int) -> int:
    """Return the least power of two that is not below some number of samples."""
    return 1 << (samples - 1).bit_length()


def mel(hertz: float) -> float:
    """Return 2595 log10(1 + f / 700). Source: O'Shaughnessy, "Speech communication", 1987."""
    return 2595 * math.log10(1 + hertz / 700)


def mel_filters(bands: int, size: int, rate: int, low: float, high: float) -> Tensor:
    """Return triangles, evenly spaced in mel: float32 [bands, size // 2 + 1].

        F_b(f) = max(0, min((f - c_{b-1}) / (c_b - c_{b-1}), (c_{b+1} - f) / (c_{b+1} - c_b)))

    with c_0 = low, c_{bands+1} = high and f_k = k rate / size. Between the first and the last
    centre the triangles of one frequency sum to 1.

    size   of the Fourier transform
    Raises ValueError unless 0 <= low < high <= rate / 2, and where so many bands leave one without
    a frequency.
    """
    if not 0 <= low < high <= rate / 2:
        raise ValueError(
            f"mel_filters: expected 0 <= low < high <= {rate / 2:g}, got low={low}, high={high}"
        )
    mels = torch.linspace(mel(low), mel(high), bands + 2, dtype=torch.float64)
    centres = 700 * (10 ** (mels / 2595) - 1)
    steps = centres.diff().unsqueeze(1)
    frequencies = torch.arange(size // 2 + 1, dtype=torch.float64) * rate / size
    rising = (frequencies - centres[:-2].unsqueeze(1)) / steps[:-1]
    falling = (centres[2:].unsqueeze(1) - frequencies) / steps[1:]
    filters = torch.minimum(rising, falling).clamp_min(0)
    if bool((filters.sum(1) == 0).any()):
        raise ValueError(f"mel_filters: {bands} bands are too many for a transform of {size}")
    return filters.float()


@dataclass(frozen=True)
class LogMel:
    """Turn waves into pictures of one size: float32 [N, bands, frames].

        L[b, t] = log(floor + sum_k F_b[k] P[t, k]),   (L - mean over t) / deviation over t

    of the wave at mean square 1, so that loudness does not matter; each band is normalised over
    the wave's own frames. Then frames are cut off, or zeros added, evenly at both ends.

    rate         samples per second
    window, hop  seconds; Hann's window
    low, high    Hz; high: half the rate by default
    floor        power that is added before the logarithm, with the wave at mean square 1
    Raises ValueError for sizes below 1 and as `mel_filters`.
    """

    rate: int = 8000
    bands: int = 32
    frames: int = 64
    window: float = 0.025
    hop: float = 0.0125
    low: float = 60.0
    high: float | None = None
    floor: float = 1e-2

    def __post_init__(self) -> None:
        sizes = {"bands": self.bands, "frames": self.frames}
        sizes |= {"window": round(self.rate * self.window), "hop": round(self.rate * self.hop)}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"LogMel: {name} must be at least 1, got {value}")
        self.filters  # noqa: B018 - raises for bands that cannot be

    @functools.cached_property
    def shape_window(self) -> Tensor:
        """Hann's window, float32 [n]."""
        return torch.hann_window(round(self.rate * self.window))

    @functools.cached_property
    def filters(self) -> Tensor:
        size = fft_size(round(self.rate * self.window))
        high = self.rate / 2 if self.high is None else self.high
        return mel_filters(self.bands, size, self.rate, self.low, high)

    def __call__(self, waves: Iterable[Tensor]) -> Tensor:
        """Return the features of some waves, each float32 [samples]."""
        pictures = [self._fit(self.normalised(wave)) for wave in waves]
        return torch.stack(pictures) if pictures else torch.empty(0, self.bands, self.frames)

    def log_power(self, wave: Tensor) -> Tensor:
        """Return L before normalisation: float32 [bands, frames of the wave]."""
        wave = wave / wave.square().mean().sqrt().clamp_min(1e-8)
        power = power_spectrum(wave, self.shape_window, round(self.rate * self.hop))
        return torch.log(self.filters @ power.T + self.floor)

    def normalised(self, wave: Tensor) -> Tensor:
        """Return L with mean 0 and deviation 1 in every band: float32 [bands, frames of wave]."""
        found = self.log_power(wave)
        centred = found - found.mean(1, keepdim=True)
        deviation = centred.square().mean(1, keepdim=True).sqrt()
        return centred / deviation.clamp_min(_LEAST_DEVIATION)

    def _fit(self, picture: Tensor) -> Tensor:
        # Negative padding cuts: both ends alike, the odd frame at the end.
        missing = self.frames - picture.shape[1]
        left = int(missing / 2)
        return torch.nn.functional.pad(picture, (left, missing - left))
