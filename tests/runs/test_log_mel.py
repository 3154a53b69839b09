"""Log-mel features and noise against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from liveweight.runs.sound.log_mel import LogMel, fft_size, mel, mel_filters, power_spectrum
from liveweight.runs.sound.noise import babble, mix, white

RATE = 8000


def sine(hertz: float, samples: int = 4000, phase: float = 0.3) -> torch.Tensor:
    return torch.sin(2 * math.pi * hertz * torch.arange(samples) / RATE + phase)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- spectrum


@pytest.mark.parametrize(("window", "hop"), [(200, 100), (256, 64), (33, 40)])
def test_power_adds_up_to_that_of_the_windowed_wave(window, hop):
    """Parseval: sum over all L frequencies of P / L = sum of (window wave)^2."""
    wave, shape = white(1000, seeded()).double(), torch.hann_window(window).double()
    power, size = power_spectrum(wave, shape, hop), fft_size(window)
    assert power.shape == (1 + (1000 - window) // hop, size // 2 + 1)
    twice = torch.full((size // 2 + 1,), 2.0).double()  # all but 0 and L / 2 stand for two
    twice[0] = twice[-1] = 1
    for t, row in enumerate(power):
        frame = wave[t * hop : t * hop + window] * shape
        assert float(row @ twice / size) == pytest.approx(float(frame.square().sum()))


def test_spectrum_is_the_discrete_fourier_transform():
    wave, shape = white(40, seeded()).double(), torch.hann_window(10).double()
    n, k = torch.arange(10).double(), torch.arange(9).double()
    turn = torch.exp(-2j * math.pi * k.outer(n) / 16)
    for t in range(6):
        expected = (turn @ (wave[5 * t : 5 * t + 10] * shape).to(torch.complex128)).abs() ** 2
        torch.testing.assert_close(power_spectrum(wave, shape, 5)[t], expected)


def test_short_waves_are_filled_to_one_window():
    shape = torch.hann_window(200)
    assert power_spectrum(torch.ones(3), shape, 80).shape == (1, 129)


# -- mel


def test_a_thousand_hertz_are_a_thousand_mel():
    assert mel(1000) == pytest.approx(1000, abs=0.05) and mel(0) == 0


def test_filters_are_triangles_that_sum_to_one_between_the_outer_centres():
    filters = mel_filters(20, 1024, RATE, 100, 3600)
    frequencies = torch.arange(513) * RATE / 1024
    steps = (mel(3600) - mel(100)) / 21
    centre = [700 * (10 ** ((mel(100) + b * steps) / 2595) - 1) for b in range(22)]
    inside = (frequencies >= centre[1]) & (frequencies <= centre[20])
    torch.testing.assert_close(filters.sum(0)[inside], torch.ones(int(inside.sum())))
    assert filters.min() == 0 and filters.max() <= 1
    outside = (frequencies <= 100) | (frequencies >= 3600)
    assert filters[:, outside].eq(0).all()
    for b, row in enumerate(filters):
        here = frequencies[row > 0]
        assert centre[b] < here.min() and here.max() < centre[b + 2]
        assert abs(float(frequencies[row.argmax()]) - centre[b + 1]) < RATE / 1024


@pytest.mark.parametrize("hertz", [150, 440, 1000, 1700, 2500, 3500])
def test_a_sine_peaks_in_the_band_around_its_frequency(hertz):
    make = LogMel()
    step = (mel(4000) - mel(60)) / 33
    expected = round((mel(hertz) - mel(60)) / step) - 1
    peaks = make.log_power(sine(hertz)).argmax(0)
    assert (peaks - expected).abs().max() <= (1 if hertz < 300 else 0)  # bins are wide down there


def test_a_sine_s_power_is_known():
    """A sine on a bin, of mean square 1: |X|^2 = 2 (sum of the window / 2)^2, all else is known."""
    make = LogMel(window=0.032, hop=0.016, floor=1e-9)
    hertz = 40 * RATE / 256
    spectrum = torch.zeros(129, dtype=torch.float64)
    spectrum[40] = 2 * (128 / 2) ** 2  # Hann's window of 256 sums to 128
    spectrum[39] = spectrum[41] = spectrum[40] / 4
    expected = torch.log(make.filters.double() @ spectrum + 1e-9)
    heard = make.filters @ (spectrum > 0).float() > 0
    got = make.log_power(5 * sine(hertz, 256 * 8)).double()[heard]
    torch.testing.assert_close(got, expected[heard, None].expand_as(got), atol=2e-3, rtol=0)


# -- pictures


def test_pictures_have_one_size_and_loudness_does_not_matter():
    make = LogMel(bands=24, frames=30)
    waves = [white(n, seeded(n)) for n in (100, 2000, 9000)]
    got = make(waves)
    assert got.shape == (3, 24, 30) and got.isfinite().all()
    torch.testing.assert_close(make([0.01 * w for w in waves]), got, atol=1e-3, rtol=1e-3)
    assert make([]).shape == (0, 24, 30)
    assert make([torch.zeros(4000)]).abs().max() < 0.01


def test_bands_are_normalised_over_the_wave_s_own_frames_then_centred():
    make = LogMel(frames=64)
    wave = white(200 + 100 * 20, seeded())  # 21 frames
    own = make.normalised(wave)
    assert own.shape == (32, 21)
    torch.testing.assert_close(own.mean(1), torch.zeros(32), atol=1e-5, rtol=0)
    torch.testing.assert_close(own.square().mean(1), torch.ones(32), atol=1e-4, rtol=0)
    picture = make([wave])[0]
    assert torch.equal(picture[:, 21:42], own)
    assert picture[:, :21].eq(0).all() and picture[:, 42:].eq(0).all()
    assert torch.equal(LogMel(frames=10)([wave])[0], own[:, 5:15])


def test_unusable_settings_are_named():
    for options, words in (
        ({"bands": 0}, "bands must be at least 1, got 0"),
        ({"frames": 0}, "frames must be at least 1"),
        ({"hop": 0.0}, "hop must be at least 1"),
        ({"low": 3000.0, "high": 2000.0}, "low=3000.0, high=2000.0"),
        ({"high": 5000.0}, "<= 4000"),
        ({"bands": 200}, "200 bands are too many for a transform of 256"),
    ):
        with pytest.raises(ValueError, match=words):
            LogMel(**options)


# -- noise


@pytest.mark.parametrize("snr", [20, 10, 5, 0, -5])
def test_the_ratio_of_signal_to_noise_is_the_one_asked_for(snr):
    wave = sine(700)
    for noise in (white(4000, seeded()), babble([sine(f, 900) for f in (90, 555)], 4000, seeded())):
        added = mix(wave, 7 * noise, snr) - wave
        ratio = 10 * torch.log10(wave.square().mean() / added.square().mean())
        assert float(ratio) == pytest.approx(snr, abs=1e-3)
        torch.testing.assert_close(added / added.norm(), noise / noise.norm(), atol=1e-4, rtol=0)


def test_noise_repeats_under_its_seed():
    waves = [white(n, seeded(n)) for n in (300, 500, 900)]
    for make in (lambda g: white(2000, g), lambda g: babble(waves, 2000, g)):
        assert torch.equal(make(seeded(3)), make(seeded(3)))
        assert not torch.equal(make(seeded(3)), make(seeded(4)))


def test_babble_is_as_many_voices_of_one_loudness():
    loud = [100 * white(5000, seeded(s)) for s in range(40)]
    alone = babble(loud, 12_000, seeded(), voices=1)
    assert len(alone) == 12_000 and float(alone.square().mean()) == pytest.approx(1)
    assert float(babble(loud, 12_000, seeded(), voices=9).square().mean()) == pytest.approx(9, 0.2)


def test_noise_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"wave is \[3\], noise \[4\]"):
        mix(torch.ones(3), torch.ones(4), 0)
    with pytest.raises(ValueError, match="the noise is zero"):
        mix(torch.ones(3), torch.zeros(3), 0)
    with pytest.raises(ValueError, match="expected waves and voices"):
        babble([], 100, seeded())
    assert mix(torch.zeros(3), torch.ones(3), 0).eq(0).all()
