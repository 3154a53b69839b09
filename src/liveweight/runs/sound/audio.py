"""Spoken words in memory: wav files of a folder or a tar archive, with label, speaker and take."""

from __future__ import annotations

import io
import pathlib
import re
import tarfile
import wave
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from liveweight.runs.sound.log_mel import LogMel

TEST_TAKES = 5  # takes 0 to 4 are the test set of the Free Spoken Digit Dataset by its own rule
_NAME = re.compile(r"(\d+)_(.+)_(\d+)\.wav", re.IGNORECASE)


@dataclass(frozen=True)
class Recordings:
    """Waves and what is known of them.

    waves     float32 [samples] in [-1, 1), one per recording
    labels    int64 [N]
    speakers  one name per recording
    takes     int64 [N], the number of the recording among those of its speaker and label
    rate      samples per second
    """

    waves: tuple[Tensor, ...]
    labels: Tensor
    speakers: tuple[str, ...]
    takes: Tensor
    rate: int

    def __len__(self) -> int:
        return len(self.waves)

    def take(self, index: Tensor) -> Recordings:
        """Return the recordings at some places: int64 [n], or bool [N]."""
        index = index.nonzero().flatten() if index.dtype == torch.bool else index
        rows = index.tolist()
        waves = tuple(self.waves[row] for row in rows)
        speakers = tuple(self.speakers[row] for row in rows)
        return Recordings(waves, self.labels[index], speakers, self.takes[index], self.rate)

    def spoken_by(self, *names: str) -> Tensor:
        """Return which recordings are of some speakers: bool [N]; ValueError: unknown speaker."""
        if unknown := sorted(set(names) - set(self.speakers)):
            known = ", ".join(sorted(set(self.speakers)))
            raise ValueError(f"no recordings of speaker {unknown[0]!r}; there are {known}")
        return torch.tensor([speaker in names for speaker in self.speakers], dtype=torch.bool)


def read_recordings(path: str | pathlib.Path) -> Recordings:
    """Read every DIGIT_SPEAKER_TAKE.wav under a folder or in a tar archive, sorted by name.

    Raises ValueError: no such place, no wav files, another name, and what `read_wave` refuses;
    rates that differ.
    """
    path = pathlib.Path(path)
    found, rate = [], 0
    for name, raw in sorted(_wav_files(path)):
        if (parts := _NAME.fullmatch(name)) is None:
            raise ValueError(f"{path}: {name!r} is not named DIGIT_SPEAKER_TAKE.wav")
        samples, rate = read_wave(raw, name, rate)
        found.append((samples, int(parts[1]), parts[2], int(parts[3])))
    if not found:
        raise ValueError(f"{path}: no wav files in there")
    waves, labels, speakers, takes = zip(*found, strict=True)
    return Recordings(waves, torch.tensor(labels), speakers, torch.tensor(takes), rate)


def _wav_files(path: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    """Yield (file name, content)."""
    if path.is_dir():
        for file in path.rglob("*"):
            if _is_wav(file.name) and file.is_file():
                yield file.name, file.read_bytes()
        return
    if not path.is_file():
        raise ValueError(f"{path}: no such folder or archive")
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = pathlib.PurePosixPath(member.name).name
                if _is_wav(name) and member.isfile():
                    yield name, archive.extractfile(member).read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{path}: not a readable tar archive ({error})") from error


def _is_wav(name: str) -> bool:
    return name.lower().endswith(".wav") and not name.startswith(".")


def read_wave(raw: bytes, name: str, rate: int = 0) -> tuple[Tensor, int]:
    """Return (samples float32 [n] in [-1, 1), rate in Hz) of a mono wav file's content.

    8 bits are unsigned around 128, 16 bits signed, as RIFF has it.
    Raises ValueError, naming the file: damaged, compressed, more than one channel, another width,
    no samples, and a rate other than the one expected (where it is not 0).
    """
    try:
        with wave.open(io.BytesIO(raw)) as file:
            channels, width, found, count, *_ = file.getparams()
            data = file.readframes(count)
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{name}: not a readable wav file ({error or 'it is cut off'})") from error
    if channels != 1:
        raise ValueError(f"{name}: has {channels} channels, expected 1")
    if width not in (1, 2):
        raise ValueError(f"{name}: has {8 * width} bits per sample, expected 8 or 16")
    if rate and found != rate:
        raise ValueError(f"{name}: has {found} samples per second, others {rate}")
    if not data or len(data) != width * count:
        raise ValueError(f"{name}: holds {len(data) // width} samples, its header says {count}")
    if width == 1:
        values = np.frombuffer(data, np.uint8).astype(np.float32) / 128 - 1
    else:
        values = np.frombuffer(data, "<i2").astype(np.float32) / 32768
    return torch.from_numpy(values), found


def wav_source(
    path: str, size: list[int]
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], tuple[str, ...]]:
    """Return ({split: (log-mel features float32 [N, bands, frames], labels int64 [N])}, classes).

    A folder with train/CLASS/*.wav and test/CLASS/*.wav, or recordings named
    DIGIT_SPEAKER_TAKE.wav in a folder or tar archive: then takes 0 to 4 are the test set.

    size   [bands, frames]; empty: 32 x 64
    Raises ValueError as `read_recordings`, and for classes that occur in test alone.
    """
    shape = {} if not size else {"bands": size[0], "frames": size[1]}
    root = pathlib.Path(path)
    if (root / "train").is_dir():
        return _class_folders(root, shape)
    all_of_them = read_recordings(root)
    features = LogMel(rate=all_of_them.rate, **shape)(all_of_them.waves).numpy()
    labels, test = all_of_them.labels.numpy(), (all_of_them.takes < TEST_TAKES).numpy()
    splits = {"train": (features[~test], labels[~test]), "test": (features[test], labels[test])}
    return splits, tuple(str(label) for label in range(1 + int(labels.max())))


def _class_folders(
    root: pathlib.Path, shape: dict[str, int]
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], tuple[str, ...]]:
    classes = tuple(sorted(p.name for p in (root / "train").iterdir() if p.is_dir()))
    splits, rate = {}, 0
    for split in ("train", "validation", "test"):
        folder = root / split
        if split == "validation" and not folder.is_dir():
            continue
        waves, labels = [], []
        for place in sorted(p for p in folder.glob("*") if p.is_dir()):
            if place.name not in classes:
                raise ValueError(f"{folder}: class {place.name!r} does not occur in train")
            for file in sorted(p for p in place.iterdir() if _is_wav(p.name)):
                samples, rate = read_wave(file.read_bytes(), str(file), rate)
                waves.append(samples)
                labels.append(classes.index(place.name))
        if not waves:
            raise ValueError(f"{folder}: expected folders of wav files, one per class, in there")
        splits[split] = LogMel(rate=rate, **shape)(waves).numpy(), np.array(labels)
    return splits, classes
