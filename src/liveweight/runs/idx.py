"""IDX files, the format of MNIST: big-endian magic number, sizes, then bytes; plain or gzipped."""

from __future__ import annotations

import gzip
import pathlib
import zlib

import numpy as np

_MAGIC = {1: 0x00000801, 3: 0x00000803}  # unsigned bytes in 1 or 3 dimensions
_NAMES = {"train": "train", "test": "t10k"}


def read_idx(path: pathlib.Path, dim: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes with dim dimensions; ValueError says what is wrong."""
    raw = _read_bytes(path)
    header = 4 + 4 * dim
    if len(raw) < header:
        raise ValueError(f"{path}: {len(raw)} bytes, an IDX header needs {header}: truncated file?")
    magic = int.from_bytes(raw[:4], "big")
    if magic != _MAGIC[dim]:
        raise ValueError(
            f"{path}: magic number 0x{magic:08x}, expected 0x{_MAGIC[dim]:08x} "
            f"(unsigned bytes, {dim} dimensions)"
        )
    shape = tuple(np.frombuffer(raw, ">u4", dim, offset=4).tolist())
    wanted = int(np.prod(shape))
    got = len(raw) - header
    if got != wanted:
        kind = "truncated" if got < wanted else "too long"
        raise ValueError(f"{path}: {kind}, {got} bytes of data, shape {shape} needs {wanted}")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def _read_bytes(path: pathlib.Path) -> bytes:
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        return gzip.decompress(path.read_bytes())
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path}: damaged or truncated gzip file ({error})") from error


def _find(folder: pathlib.Path, stem: str, dim: int) -> pathlib.Path:
    # both spellings are in circulation: train-images-idx3-ubyte and train-images.idx3-ubyte
    for name in (f"{stem}-idx{dim}-ubyte", f"{stem}.idx{dim}-ubyte"):
        for suffix in ("", ".gz"):
            path = folder / (name + suffix)
            if path.is_file():
                return path
    raise ValueError(f"{folder}: no {stem}-idx{dim}-ubyte or {stem}-idx{dim}-ubyte.gz in there")


def read_mnist_folder(folder: pathlib.Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return [(train images, labels), (test images, labels)], uint8 [N, H, W] and [N].

    The folder holds MNIST's four files, {train,t10k}-{images-idx3,labels-idx1}-ubyte, plain or
    .gz. ValueError: a file is missing, damaged or empty, or lengths differ.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    splits = []
    for split, stem in _NAMES.items():
        images_path = _find(folder, f"{stem}-images", 3)
        labels_path = _find(folder, f"{stem}-labels", 1)
        images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
        if len(images) != len(labels):
            raise ValueError(
                f"{folder}: {split} has {len(images)} images but {len(labels)} labels "
                f"({images_path.name}, {labels_path.name})"
            )
        if len(images) == 0:
            raise ValueError(f"{images_path}: no images in there")
        splits.append((images, labels))
    return splits
