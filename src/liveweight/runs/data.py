"""Data sets as tensors in memory: embedded digits, IDX, image folders, wav files, NumPy files."""

from __future__ import annotations

import pathlib
import zipfile
import zlib
from dataclasses import dataclass

import numpy as np
import torch

from liveweight.runs.idx import read_mnist_folder
from liveweight.runs.images import Arrays, ImageFolders
from liveweight.runs.recipe import DataRecipe
from liveweight.runs.sound.audio import wav_source

DIGITS = pathlib.Path(__file__).with_name("digits.npz")
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Split:
    """inputs [N, ...] float32, labels [N] int64."""

    inputs: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Split:
        return Split(self.inputs.to(device), self.labels.to(device))

    def take(self, index: torch.Tensor) -> Split:
        return Split(self.inputs[index], self.labels[index])


@dataclass(frozen=True)
class Dataset:
    """Three splits and the names of the classes."""

    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]

    def to(self, device: torch.device) -> Dataset:
        parts = (getattr(self, name).to(device) for name in SPLITS)
        return Dataset(*parts, self.classes)


def load_data(recipe: DataRecipe, seed: int = 0) -> Dataset:
    """Load the data a recipe names; the validation set is split off train where there is none.

    Bytes are scaled to [0, 1], then mean and std are applied. Grey images [N, H, W] become
    [N, 1, H, W]. ValueError: missing, damaged or empty files, lengths that differ, bad labels.
    """
    loader = {
        "digits": _digits,
        "idx": _idx,
        "images": _images,
        "numpy": _numpy,
        "wav": lambda recipe: wav_source(recipe.path, recipe.size),
    }[recipe.source]
    arrays, classes = loader(recipe)
    where = recipe.path or recipe.source
    for name, (inputs, labels) in arrays.items():
        _check_split(f"{where}: {name}", inputs, labels)
    if "validation" not in arrays:
        rest, held = stratified_split(arrays["train"][1], recipe.validation, seed)
        inputs, labels = arrays["train"]
        arrays["train"] = inputs[rest], labels[rest]
        arrays["validation"] = inputs[held], labels[held]
    splits = {}
    for name in SPLITS:
        inputs, labels = arrays[name]
        if recipe.limit is not None and recipe.limit < len(labels):
            _, index = stratified_split(labels, recipe.limit, seed)
            inputs, labels = inputs[index], labels[index]
        splits[name] = Split(_to_inputs(inputs, recipe), torch.from_numpy(labels.astype(np.int64)))
    if not classes:
        count = 1 + max(int(labels.max()) for _, labels in arrays.values())
        classes = tuple(str(label) for label in range(count))
    return Dataset(**splits, classes=classes)


def stratified_split(labels: np.ndarray, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return shuffled indices (rest, drawn) with size drawn, each class in proportion.

    Shares that are not whole are rounded by largest remainder. ValueError: size >= len(labels).
    """
    if not 0 < size < len(labels):
        raise ValueError(f"cannot split {size} samples off {len(labels)}")
    rng = np.random.Generator(np.random.PCG64(seed))
    classes, counts = np.unique(labels, return_counts=True)
    share = counts * size / len(labels)
    take = np.floor(share).astype(int)
    for c in np.argsort(take - share, kind="stable")[: size - take.sum()]:
        take[c] += 1
    drawn = np.concatenate(
        [
            rng.permutation(np.flatnonzero(labels == c))[:n]
            for c, n in zip(classes, take, strict=True)
        ]
    )
    rest = np.setdiff1d(np.arange(len(labels)), drawn)
    return rng.permutation(rest), rng.permutation(drawn)


def _check_split(where: str, inputs: np.ndarray, labels: np.ndarray) -> None:
    if len(inputs) != len(labels):
        raise ValueError(f"{where} has {len(inputs)} inputs but {len(labels)} labels")
    if len(labels) == 0:
        raise ValueError(f"{where} is empty")
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        got = f"{labels.dtype} {labels.shape}"
        raise ValueError(f"{where}: labels must be whole numbers [N], got {got}")
    if labels.min() < 0:
        raise ValueError(f"{where}: labels must be 0 or more, got {labels.min()}")
    if inputs.dtype.kind not in "uif":
        raise ValueError(f"{where}: inputs must be numbers, got {inputs.dtype}")


def _to_inputs(array: np.ndarray, recipe: DataRecipe) -> torch.Tensor:
    x = torch.from_numpy(array.astype(np.float32))
    if array.dtype == np.uint8:
        x /= 255
    if x.dim() == 3:
        x = x.unsqueeze(1)
    if recipe.mean:
        channels = x.shape[1] if x.dim() > 1 else 1
        if len(recipe.mean) != channels:
            raise ValueError(
                f"data.mean has {len(recipe.mean)} numbers, inputs {channels} channels"
            )
        shape = (1, channels) + (1,) * (x.dim() - 2)
        mean, std = (torch.tensor(v).reshape(shape) for v in (recipe.mean, recipe.std))
        x.sub_(mean).div_(std)  # in place: 50,000 images take 600 MB, and each copy as much again
    return x.contiguous()


def _digits(recipe: DataRecipe) -> tuple[Arrays, tuple[str, ...]]:
    return _read_archive(DIGITS), tuple("0123456789")


def _idx(recipe: DataRecipe) -> tuple[Arrays, tuple[str, ...]]:
    train, test = read_mnist_folder(pathlib.Path(recipe.path))
    return {"train": train, "test": test}, ()


def _numpy(recipe: DataRecipe) -> tuple[Arrays, tuple[str, ...]]:
    return _read_archive(pathlib.Path(recipe.path)), ()


def _read_archive(path: pathlib.Path) -> Arrays:
    """Read {train,validation,test}_{images,labels} or _{x,y}; validation may be missing."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: not an .npz archive")
    try:
        with np.load(path, allow_pickle=False) as archive:
            stored = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a readable .npz archive ({error})") from error
    arrays = {}
    for split in SPLITS:
        for x, y in ((f"{split}_images", f"{split}_labels"), (f"{split}_x", f"{split}_y")):
            if (x in stored) != (y in stored):
                raise ValueError(f"{path}: has {x if x in stored else y} but not its pair")
            if x in stored:
                arrays[split] = stored[x], stored[y]
    for split in ("train", "test"):
        if split not in arrays:
            names = ", ".join(stored) or "nothing"
            raise ValueError(f"{path}: no {split}_images and {split}_labels; it holds {names}")
    return arrays


def _images(recipe: DataRecipe) -> tuple[Arrays, tuple[str, ...]]:
    return ImageFolders(pathlib.Path(recipe.path), recipe.channels, tuple(recipe.size)).read()
