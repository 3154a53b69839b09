"""Make the embedded digits: 5,000 of MNIST's handwritten digits, balanced over the ten classes.

    python -m liveweight.runs.make_digits MNIST_FOLDER [--out digits.npz]

Source: the MNIST database of handwritten digits by Yann LeCun and Corinna Cortes, a derivative of
NIST's special databases 1 and 3, available under Creative Commons BY-SA 3.0. Change made here: a
random selection, stratified by class; the pixels are as they were.

Training (3,500) and validation (500) digits come from MNIST's training files, test digits (1,000)
from its test files, so no test digit of MNIST is ever trained on. The draw is seeded and the
archive carries no dates: the same input gives the same bytes.
"""

from __future__ import annotations

import argparse
import io
import pathlib
import zipfile

import numpy as np

from liveweight.runs.idx import read_mnist_folder

SEED = 20
CLASSES = 10
SIZES = {"train": 3500, "validation": 500, "test": 1000}
ABOUT = (
    "5,000 digits of the MNIST database of handwritten digits by Yann LeCun and Corinna Cortes, "
    "licence CC BY-SA 3.0 (https://creativecommons.org/licenses/by-sa/3.0/). Changed: a random "
    "selection, stratified by class; train and validation from MNIST's training files, test from "
    "its test files. Made by python -m liveweight.runs.make_digits."
)


def draw(labels: np.ndarray, sizes: list[int], rng: np.random.Generator) -> list[np.ndarray]:
    """Return, for each size, indices that are balanced over the classes; no index twice."""
    parts: list[list[np.ndarray]] = [[] for _ in sizes]
    for digit in range(CLASSES):
        order = rng.permutation(np.flatnonzero(labels == digit))
        ends = np.cumsum([size // CLASSES for size in sizes])
        if len(order) < ends[-1]:
            raise ValueError(f"digit {digit} occurs {len(order)} times, {ends[-1]} are needed")
        for part, chunk in zip(parts, np.split(order[: ends[-1]], ends[:-1]), strict=True):
            part.append(chunk)
    return [rng.permutation(np.concatenate(part)) for part in parts]


def select(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Return the arrays of the archive: {split}_images uint8 [N, 28, 28], {split}_labels uint8."""
    (train_images, train_labels), (test_images, test_labels) = read_mnist_folder(folder)
    rng = np.random.Generator(np.random.PCG64(SEED))
    train, validation = draw(train_labels, [SIZES["train"], SIZES["validation"]], rng)
    (test,) = draw(test_labels, [SIZES["test"]], rng)
    return {
        "about": np.array(ABOUT),
        "train_images": train_images[train],
        "train_labels": train_labels[train],
        "validation_images": train_images[validation],
        "validation_labels": train_labels[validation],
        "test_images": test_images[test],
        "test_labels": test_labels[test],
    }


def write(arrays: dict[str, np.ndarray], path: pathlib.Path) -> None:
    """Write an .npz with fixed dates and full compression, whole or not at all."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy")  # dated 1980-01-01 unless told otherwise
            entry.create_system = 3  # the writer's platform is otherwise a byte of the archive
            archive.writestr(entry, member.getvalue(), zipfile.ZIP_DEFLATED, compresslevel=9)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(buffer.getvalue())
    partial.replace(path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m liveweight.runs.make_digits", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("folder", type=pathlib.Path, help="folder of MNIST's four IDX files")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path(__file__).with_name("digits.npz"),
        help="archive to write (default: the one inside the package)",
    )
    arguments = parser.parse_args(argv)
    write(select(arguments.folder), arguments.out)
    print(f"{arguments.out}: {arguments.out.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
