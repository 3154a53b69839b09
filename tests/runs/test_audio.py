"""Recordings from folders and archives; the wav source of recipes."""

from __future__ import annotations

import io
import tarfile
import wave

import numpy as np
import pytest
import torch

from liveweight.runs.data import load_data
from liveweight.runs.recipe import DataRecipe
from liveweight.runs.sound.audio import read_recordings, read_wave

RATE = 8000


def wav_bytes(values: np.ndarray, width: int = 2, rate: int = RATE, channels: int = 1) -> bytes:
    """Whole numbers as they lie in the file: int16, or bytes around 128."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        file.writeframes(values.astype("<i2" if width == 2 else np.uint8).tobytes())
    return buffer.getvalue()


def tone(digit: int, seed: int, length: int = 2400) -> np.ndarray:
    rng = np.random.default_rng(seed)
    wave_ = np.sin(2 * np.pi * (300 + 250 * digit) * np.arange(length) / RATE)
    return np.round(8000 * wave_ + 300 * rng.standard_normal(length))


@pytest.fixture
def words(tmp_path):
    """Two digits, two speakers, seven takes each."""
    for digit in range(2):
        for s, speaker in enumerate(("ada", "bob_b")):
            for take in range(7):
                raw = wav_bytes(tone(digit, 100 * s + take, 2400 + 100 * take))
                (tmp_path / f"{digit}_{speaker}_{take}.wav").write_bytes(raw)
    (tmp_path / "README.md").write_text("not a recording")
    return tmp_path


def archive_of(folder, path, mode):
    with tarfile.open(path, mode) as archive:
        for file in sorted(folder.iterdir(), reverse=True):  # the order in there does not matter
            archive.add(file, f"recordings/{file.name}")
    return path


def test_recordings_keep_label_speaker_and_take(words):
    found = read_recordings(words)
    assert len(found) == 28 and found.rate == RATE
    assert found.labels.tolist() == [0] * 14 + [1] * 14
    assert set(found.speakers) == {"ada", "bob_b"}
    theirs = found.take(found.spoken_by("bob_b") & (found.takes == 6))
    assert theirs.labels.tolist() == [0, 1] and theirs.speakers == ("bob_b", "bob_b")
    assert [len(w) for w in theirs.waves] == [3000, 3000]
    expected = torch.from_numpy(tone(1, 106, 3000).astype(np.float32)) / 32768
    assert torch.equal(theirs.waves[1], expected)
    with pytest.raises(ValueError, match="no recordings of speaker 'eve'; there are ada, bob_b"):
        found.spoken_by("ada", "eve")


@pytest.mark.parametrize("mode", ["w", "w:xz", "w:gz"])
def test_archives_give_what_their_folder_gives(words, tmp_path_factory, mode):
    path = archive_of(words, tmp_path_factory.mktemp("a") / "words.tar", mode)
    ours, theirs = read_recordings(path), read_recordings(words)
    assert ours.speakers == theirs.speakers and torch.equal(ours.takes, theirs.takes)
    assert all(torch.equal(a, b) for a, b in zip(ours.waves, theirs.waves, strict=True))


def test_eight_bits_are_unsigned_and_sixteen_signed():
    samples, rate = read_wave(wav_bytes(np.array([0, 128, 255]), width=1, rate=11025), "x.wav")
    assert samples.tolist() == [-1, 0, 127 / 128] and rate == 11025
    samples, _ = read_wave(wav_bytes(np.array([-32768, 0, 16384, 32767])), "x.wav")
    assert samples.tolist() == [-1, 0, 0.5, 32767 / 32768] and samples.dtype == torch.float32


def test_unusable_wav_files_are_named():
    good = wav_bytes(np.arange(100))
    for raw, words_, rate in (
        (b"", "x.wav: not a readable wav file", 0),
        (b"RIFF but nothing else", "x.wav: not a readable wav file", 0),
        (good[:-50], "holds 75 samples, its header says 100", 0),
        (wav_bytes(np.array([])), "holds 0 samples", 0),
        (wav_bytes(np.zeros(8), channels=2), "has 2 channels, expected 1", 0),
        (good, "has 8000 samples per second, others 16000", 16000),
    ):
        with pytest.raises(ValueError, match=words_):
            read_wave(raw, "x.wav", rate)
    wide = io.BytesIO()
    with wave.open(wide, "wb") as file:
        file.setparams((1, 3, RATE, 0, "NONE", ""))
        file.writeframes(bytes(30))
    with pytest.raises(ValueError, match="24 bits per sample, expected 8 or 16"):
        read_wave(wide.getvalue(), "x.wav")


def test_unusable_places_are_named(tmp_path):
    with pytest.raises(ValueError, match="no such folder or archive"):
        read_recordings(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no wav files"):
        read_recordings(tmp_path)
    (tmp_path / "words.tar").write_bytes(b"no archive" * 100)
    with pytest.raises(ValueError, match="not a readable tar archive"):
        read_recordings(tmp_path / "words.tar")
    (tmp_path / "seven.wav").write_bytes(wav_bytes(np.arange(9)))
    with pytest.raises(ValueError, match=r"'seven.wav' is not named DIGIT_SPEAKER_TAKE.wav"):
        read_recordings(tmp_path)


def test_takes_below_five_are_the_test_set(words):
    recipe = DataRecipe(source="wav", path=str(words), validation=2, size=[16, 24])
    data = load_data(recipe)
    assert data.train.inputs.shape == (6, 1, 16, 24) and len(data.validation) == 2
    assert data.test.inputs.shape == (20, 1, 16, 24) and data.test.labels.bincount().tolist() == [
        10,
        10,
    ]
    assert data.classes == ("0", "1") and data.test.inputs.dtype == torch.float32


def test_class_folders_give_their_splits(tmp_path):
    for split, count in (("train", 4), ("validation", 2), ("test", 3)):
        for digit, name in enumerate(("no", "yes")):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{i}.wav").write_bytes(wav_bytes(tone(digit, i)))
    recipe = DataRecipe(source="wav", path=str(tmp_path))
    data = load_data(recipe)
    assert data.classes == ("no", "yes")
    assert [len(s) for s in (data.train, data.validation, data.test)] == [8, 4, 6]
    assert data.train.inputs.shape[1:] == (1, 32, 64)
    assert data.test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    (tmp_path / "test" / "perhaps").mkdir()
    with pytest.raises(ValueError, match="'perhaps' does not occur in train"):
        load_data(recipe)


def test_the_spoken_digits_are_read_whole(shared_data):
    found = read_recordings(shared_data / "free-spoken-digits.tar.xz")
    assert len(found) == 3000 and found.rate == 8000
    assert found.labels.bincount().tolist() == [300] * 10
    assert {s: found.speakers.count(s) for s in set(found.speakers)} == dict.fromkeys(
        ("george", "jackson", "lucas", "nicolas", "theo", "yweweler"), 500
    )
    assert min(map(len, found.waves)) == 1148 and max(map(len, found.waves)) == 18262
