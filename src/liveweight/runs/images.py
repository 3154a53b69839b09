"""Folders of images by class, decoded once: the pixels are remembered in the user's cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
from dataclasses import dataclass

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from liveweight.compress.cache import cache_folder

Arrays = dict[str, tuple[np.ndarray, np.ndarray]]

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
_FOLDERS = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}
WORTH = 1000  # images from which a folder's pixels are remembered


@dataclass(frozen=True)
class ImageFolders:
    """root/train/CLASS/*.png and root/test/CLASS/*.png; validation/ (or val/) may be missing.

    channels   1 (grey) or 3 (RGB)
    size       [height, width] to resize to; empty: as they are
    """

    root: pathlib.Path
    channels: int = 3
    size: tuple[int, ...] = ()

    def read(self) -> tuple[Arrays, tuple[str, ...]]:
        """Return split -> (uint8 [N, channels, H, W], int64 [N]) and the names of the classes.

        The order is that of the sorted names. Pixels of large folders come from the user's cache
        as long as no file's name, size or time of change differs. ValueError: missing folders,
        classes that train lacks, files that are no images, sizes that differ.
        """
        if not self.root.is_dir():
            raise ValueError(f"{self.root}: no such folder")
        classes = _class_names(self.root / "train")
        files = {
            split: _files(self.root / name, classes)
            for name, split in _FOLDERS.items()
            if name in ("train", "test") or (self.root / name).is_dir()
        }
        place = self._place() if sum(map(len, files.values())) >= WORTH else None
        state = _digest(files) if place is not None else ""
        arrays = _recall(place, state) if place is not None else None
        if arrays is None:
            arrays = {split: self._decode(found) for split, found in files.items()}
            if place is not None:
                _remember(place, state, arrays)
        return arrays, classes

    def _place(self) -> pathlib.Path | None:
        """Return the cache's file for this folder; None where the cache is off."""
        folder = cache_folder()
        if folder is None:
            return None
        text = json.dumps([str(self.root.resolve()), self.channels, list(self.size)])
        return folder / "images" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"

    def _decode(self, files: list[tuple[pathlib.Path, int]]) -> tuple[np.ndarray, np.ndarray]:
        first = self._decode_one(files[0][0])
        images = np.empty((len(files), *first.shape), dtype=np.uint8)
        for i, (path, _) in enumerate(files):
            image = self._decode_one(path)
            if image.shape != first.shape:
                raise ValueError(
                    f"{path}: {image.shape[2]}x{image.shape[1]} pixels, earlier images have "
                    f"{first.shape[2]}x{first.shape[1]}; set data.size to resize"
                )
            images[i] = image
        return images, np.array([label for _, label in files])

    def _decode_one(self, path: pathlib.Path) -> np.ndarray:
        """Return uint8 [channels, H, W]."""
        try:
            from PIL import Image, UnidentifiedImageError
        except ImportError:
            raise ValueError("data.source images needs Pillow: pip install pillow") from None
        try:
            with Image.open(path) as file:
                image = file.convert("L" if self.channels == 1 else "RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{path}: not a readable image ({error})") from error
        if self.size:
            image = image.resize((self.size[1], self.size[0]), Image.Resampling.BILINEAR)
        pixels = np.asarray(image, dtype=np.uint8)
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _class_names(folder: pathlib.Path) -> tuple[str, ...]:
    names = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    if not names:
        raise ValueError(f"{folder}: expected one folder of images per class in there")
    return tuple(names)


def _files(folder: pathlib.Path, classes: tuple[str, ...]) -> list[tuple[pathlib.Path, int]]:
    """Return (file, label) in the order of classes and names."""
    if unknown := sorted(set(_class_names(folder)) - set(classes)):
        raise ValueError(f"{folder}: class {unknown[0]!r} does not occur in train")
    found = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).glob("*"))
        if path.suffix.lower() in _SUFFIXES
    ]
    if not found:
        raise ValueError(f"{folder}: no images ({', '.join(sorted(_SUFFIXES))}) in there")
    return found


def _digest(files: dict[str, list[tuple[pathlib.Path, int]]]) -> str:
    """Return a digest of every file's split, label, name, size and time of change."""
    digest = hashlib.sha256()
    for split, found in files.items():
        for path, label in found:
            facts = path.stat()
            line = f"{split}/{label}/{path.name}/{facts.st_size}/{facts.st_mtime_ns}\n"
            digest.update(line.encode())
    return digest.hexdigest()


def _recall(place: pathlib.Path, state: str) -> Arrays | None:
    """Return what was remembered of the same files; None where that is nothing or damaged."""
    try:
        with safe_open(place, "np") as file:
            if (file.metadata() or {}).get("state") != state:
                return None
            names = {key.partition(".")[0] for key in file.keys()}  # noqa: SIM118
            return {n: tuple(file.get_tensor(f"{n}.{k}") for k in ("x", "y")) for n in names}
    except (OSError, SafetensorError):
        return None


def _remember(place: pathlib.Path, state: str, arrays: Arrays) -> None:
    """Write the cache's file whole; where it cannot be written, the images are read again."""
    partial = place.with_name(f"{place.name}.{os.getpid()}")
    tensors = {f"{n}.{k}": v for n, pair in arrays.items() for k, v in zip("xy", pair, strict=True)}
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, metadata={"state": state})
        os.replace(partial, place)
    except (OSError, SafetensorError):
        with contextlib.suppress(OSError):
            partial.unlink()
