from __future__ import annotations

import gzip
import hashlib

import numpy as np
import pytest
import torch

from liveweight.runs import images, make_digits
from liveweight.runs.data import DIGITS, load_data, stratified_split
from liveweight.runs.idx import read_idx, read_mnist_folder
from liveweight.runs.recipe import DataRecipe


def idx_bytes(array: np.ndarray) -> bytes:
    head = (0x0800 | array.ndim).to_bytes(4, "big")
    return head + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def write_mnist(folder, train: int = 60, test: int = 20, gz: bool = False):
    rng = np.random.default_rng(0)
    for stem, count in (("train", train), ("t10k", test)):
        images = rng.integers(0, 256, (count, 8, 6), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, array in (
            (f"{stem}-images-idx3-ubyte", images),
            (f"{stem}-labels-idx1-ubyte", labels),
        ):
            raw = idx_bytes(array)
            path = folder / (name + (".gz" if gz else ""))
            path.write_bytes(gzip.compress(raw) if gz else raw)
    return folder


def idx_recipe(folder, **more) -> DataRecipe:
    return DataRecipe(source="idx", path=str(folder), **({"validation": 20} | more))


# -- embedded digits


def test_digits_are_balanced_and_whole():
    data = load_data(DataRecipe())
    assert [len(s) for s in (data.train, data.validation, data.test)] == [3500, 500, 1000]
    for split in (data.train, data.validation, data.test):
        assert split.inputs.shape[1:] == (1, 28, 28)
        assert split.inputs.dtype == torch.float32 and split.labels.dtype == torch.int64
        assert split.inputs.min() == 0 and split.inputs.max() == 1
        assert torch.bincount(split.labels).tolist() == [len(split) // 10] * 10
    assert data.classes == tuple("0123456789")


def test_digits_share_no_image_between_the_splits():
    data = load_data(DataRecipe())
    seen = [
        {hashlib.sha1(x.numpy().tobytes()).digest() for x in split.inputs}
        for split in (data.train, data.validation, data.test)
    ]
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]


def test_digits_say_where_they_come_from():
    with np.load(DIGITS) as archive:
        about = str(archive["about"])
    assert "LeCun" in about and "CC BY-SA 3.0" in about and "make_digits" in about


def test_digits_are_made_again_byte_for_byte(shared_data, tmp_path):
    folder = shared_data / "mnist"
    outs = [tmp_path / "a.npz", tmp_path / "b.npz"]
    for out in outs:
        assert make_digits.main([str(folder), "--out", str(out)]) == 0
    assert outs[0].read_bytes() == outs[1].read_bytes()
    with np.load(outs[0]) as new, np.load(DIGITS) as shipped:
        assert new.files == shipped.files
        assert all(np.array_equal(new[name], shipped[name]) for name in new.files)


def test_draw_names_a_class_that_is_too_small():
    labels = np.repeat(np.arange(10), 5)
    with pytest.raises(ValueError, match="digit 0 occurs 5 times, 6 are needed"):
        make_digits.draw(labels, [40, 20], np.random.default_rng(0))


# -- stratified split


def test_stratified_split_is_disjoint_seeded_and_in_proportion():
    labels = np.repeat([0, 1, 2], [50, 30, 20])
    rest, drawn = stratified_split(labels, 10, seed=3)
    assert np.bincount(labels[drawn]).tolist() == [5, 3, 2]
    assert sorted([*rest, *drawn]) == list(range(100))
    again = stratified_split(labels, 10, seed=3)
    assert np.array_equal(drawn, again[1]) and np.array_equal(rest, again[0])
    assert not np.array_equal(drawn, stratified_split(labels, 10, seed=4)[1])


def test_stratified_split_rounds_by_largest_remainder():
    labels = np.repeat([0, 1, 2], [5, 3, 2])
    assert len(stratified_split(labels, 4, seed=0)[1]) == 4
    with pytest.raises(ValueError, match="cannot split 10 samples off 10"):
        stratified_split(labels, 10, seed=0)


# -- IDX


@pytest.mark.parametrize("gz", [False, True])
def test_idx_folder(tmp_path, gz):
    data = load_data(idx_recipe(write_mnist(tmp_path, gz=gz)))
    assert data.train.inputs.shape == (40, 1, 8, 6)
    assert len(data.validation) == 20 and len(data.test) == 20
    assert torch.bincount(data.validation.labels).tolist() == [2] * 10
    assert len(data.classes) == 10


def test_idx_missing_folder_and_file(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        load_data(idx_recipe(tmp_path / "absent"))
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(ValueError, match="no t10k-labels-idx1-ubyte"):
        load_data(idx_recipe(tmp_path))


def test_idx_wrong_magic_number(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"\x00\x00\x08\x01" + bytes(40))
    with pytest.raises(ValueError, match="magic number 0x00000801, expected 0x00000803"):
        load_data(idx_recipe(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw[:-5], "truncated"),
        (lambda raw: raw + b"x", "too long"),
        (lambda raw: raw[:9], "truncated file"),
        (lambda raw: b"", "truncated file"),
    ],
)
def test_idx_damaged_file(tmp_path, change, message):
    path = write_mnist(tmp_path) / "train-images-idx3-ubyte"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as error:
        read_idx(path, 3)
    assert str(path) in str(error.value)


def test_idx_truncated_gzip(tmp_path):
    path = write_mnist(tmp_path, gz=True) / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="damaged or truncated gzip"):
        read_idx(path, 3)


def test_idx_lengths_that_differ_and_empty(tmp_path):
    write_mnist(tmp_path)
    labels = tmp_path / "train-labels-idx1-ubyte"
    labels.write_bytes(idx_bytes(np.zeros(7, np.uint8)))
    with pytest.raises(ValueError, match="train has 60 images but 7 labels"):
        read_mnist_folder(tmp_path)
    labels.write_bytes(idx_bytes(np.zeros(0, np.uint8)))
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx_bytes(np.zeros((0, 8, 6), np.uint8)))
    with pytest.raises(ValueError, match="no images"):
        read_mnist_folder(tmp_path)


def test_validation_larger_than_train(tmp_path):
    with pytest.raises(ValueError, match="cannot split 60 samples off 60"):
        load_data(idx_recipe(write_mnist(tmp_path), validation=60))


def test_limit_keeps_a_stratified_part(tmp_path):
    data = load_data(idx_recipe(write_mnist(tmp_path), limit=10))
    assert [len(s) for s in (data.train, data.validation, data.test)] == [10, 10, 10]
    assert torch.bincount(data.test.labels).tolist() == [1] * 10


# -- NumPy


def numpy_recipe(path, **more) -> DataRecipe:
    return DataRecipe(source="numpy", path=str(path), **({"validation": 4} | more))


def test_numpy_archive_with_features(tmp_path):
    path = tmp_path / "d.npz"
    x = np.arange(60, dtype=np.float64).reshape(20, 3)
    np.savez(path, train_x=x, train_y=np.arange(20) % 2, test_x=x[:4], test_y=np.arange(4) % 2)
    data = load_data(numpy_recipe(path))
    assert data.train.inputs.shape == (16, 3) and data.train.inputs.dtype == torch.float32
    assert torch.equal(data.test.inputs, torch.from_numpy(x[:4]).float())  # floats: not scaled
    assert data.classes == ("0", "1")


def test_numpy_normalisation_per_channel(tmp_path):
    path = tmp_path / "d.npz"
    x = np.full((8, 2, 3, 3), 255, np.uint8)
    np.savez(path, train_x=x, train_y=np.arange(8) % 2, test_x=x, test_y=np.arange(8) % 2)
    data = load_data(numpy_recipe(path, mean=[0.5, 1.0], std=[0.5, 2.0]))
    assert data.test.inputs[:, 0].eq(1).all() and data.test.inputs[:, 1].eq(0).all()
    with pytest.raises(ValueError, match="mean has 1 numbers, inputs 2 channels"):
        load_data(numpy_recipe(path, mean=[0.5], std=[0.5]))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": np.zeros(3)}, "no train_images and train_labels; it holds a"),
        ({"train_x": np.zeros((3, 2))}, "has train_x but not its pair"),
        ({"train_x": np.zeros((3, 2)), "train_y": np.zeros(2, int)}, "3 inputs but 2 labels"),
        ({"train_x": np.zeros((0, 2)), "train_y": np.zeros(0, int)}, "train is empty"),
        ({"train_x": np.zeros((3, 2)), "train_y": np.zeros(3)}, "labels must be whole numbers"),
        ({"train_x": np.zeros((3, 2)), "train_y": -np.ones(3, int)}, "labels must be 0 or more"),
        ({"train_x": np.array(["a"] * 3), "train_y": np.zeros(3, int)}, "inputs must be numbers"),
    ],
)
def test_numpy_archives_that_cannot_be_used(tmp_path, arrays, message):
    path = tmp_path / "d.npz"
    good = {"test_x": np.zeros((3, 2)), "test_y": np.zeros(3, int)}
    np.savez(path, **arrays, **good)
    with pytest.raises(ValueError, match=message):
        load_data(numpy_recipe(path))


def test_numpy_missing_and_damaged(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load_data(numpy_recipe(tmp_path / "absent.npz"))
    path = tmp_path / "d.npz"
    path.write_bytes(b"PK\x03\x04 not an archive")
    with pytest.raises(ValueError, match="not an .npz archive"):
        load_data(numpy_recipe(path))
    with open(tmp_path / "one.npz", "wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match="not an .npz archive"):
        load_data(numpy_recipe(tmp_path / "one.npz"))


# -- image folders


def image_recipe(folder, **more) -> DataRecipe:
    return DataRecipe(
        source="images", path=str(folder), **({"validation": 2, "channels": 3} | more)
    )


def write_images(folder, per_class: int = 4):
    image = pytest.importorskip("PIL.Image")
    for split in ("train", "test"):
        for shade, name in ((10, "cat"), (200, "dog")):
            place = folder / split / name
            place.mkdir(parents=True)
            for i in range(per_class):
                image.new("RGB", (6, 5), (shade, 0, i)).save(place / f"{i}.png")
    return folder


def test_image_folders(tmp_path):
    data = load_data(image_recipe(write_images(tmp_path)))
    assert data.classes == ("cat", "dog")
    assert data.train.inputs.shape == (6, 3, 5, 6) and len(data.validation) == 2
    assert torch.allclose(data.test.inputs[:4, 0], torch.tensor(10 / 255))
    assert data.test.labels.tolist() == [0] * 4 + [1] * 4
    grey = load_data(image_recipe(tmp_path, channels=1, size=[8, 8]))
    assert grey.train.inputs.shape == (6, 1, 8, 8)


def test_image_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        load_data(image_recipe(tmp_path / "absent"))
    with pytest.raises(ValueError, match="one folder of images per class"):
        load_data(image_recipe(tmp_path))
    write_images(tmp_path)
    (tmp_path / "test" / "bird").mkdir()
    with pytest.raises(ValueError, match="class 'bird' does not occur in train"):
        load_data(image_recipe(tmp_path))
    (tmp_path / "test" / "bird").rmdir()
    (tmp_path / "train" / "cat" / "zz.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="not a readable image"):
        load_data(image_recipe(tmp_path))


def test_image_folders_of_different_sizes(tmp_path):
    image = pytest.importorskip("PIL.Image")
    write_images(tmp_path)
    image.new("RGB", (7, 5)).save(tmp_path / "train" / "dog" / "9.png")
    with pytest.raises(ValueError, match="7x5 pixels, earlier images have 6x5; set data.size"):
        load_data(image_recipe(tmp_path))


def test_image_folders_without_images(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match="no images"):
        load_data(image_recipe(tmp_path))


def test_image_folders_without_pillow(tmp_path, monkeypatch):
    write_images(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(ValueError, match="needs Pillow: pip install pillow"):
        load_data(image_recipe(tmp_path))


# -- pixels that are remembered


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of pixels that small folders are worth, and a count of images decoded."""
    monkeypatch.setenv("LIVEWEIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(images, "WORTH", 16)
    decoded, real = [], images.ImageFolders._decode_one
    monkeypatch.setattr(
        images.ImageFolders,
        "_decode_one",
        lambda self, path: decoded.append(path) or real(self, path),
    )
    return decoded


def same_data(a, b) -> bool:
    parts = [(getattr(a, n), getattr(b, n)) for n in ("train", "validation", "test")]
    same = all(
        torch.equal(x.inputs, y.inputs) and torch.equal(x.labels, y.labels) for x, y in parts
    )
    return same and a.classes == b.classes


def test_pixels_are_decoded_once(tmp_path, cache):
    recipe = image_recipe(write_images(tmp_path / "data"))
    first = load_data(recipe)
    assert len(cache) == 18  # 16 images, the first of each split twice
    again = load_data(recipe)
    assert len(cache) == 18 and same_data(first, again)
    grey = load_data(image_recipe(tmp_path / "data", channels=1))
    assert len(cache) == 36 and grey.train.inputs.shape[1] == 1
    assert len(list((tmp_path / "cache" / "images").iterdir())) == 2


def test_pixels_of_files_that_changed_are_decoded_again(tmp_path, cache):
    recipe = image_recipe(write_images(tmp_path / "data"))
    load_data(recipe)
    changed = tmp_path / "data" / "test" / "cat" / "0.png"
    pytest.importorskip("PIL.Image").new("RGB", (6, 5), (77, 7, 7)).save(changed)
    assert load_data(recipe).test.inputs[0, 0, 0, 0].item() == pytest.approx(77 / 255)
    changed.rename(changed.with_name("4.png"))
    assert load_data(recipe).test.inputs[3, 0, 0, 0].item() == pytest.approx(77 / 255)
    (place,) = (tmp_path / "cache" / "images").iterdir()  # the newest state replaces the older
    count = len(cache)
    place.write_bytes(b"damaged")
    data = load_data(recipe)
    assert len(cache) == count + 18 and len(data.train) == 6


def test_pixels_are_not_remembered_where_that_is_off_small_or_impossible(
    tmp_path, cache, monkeypatch
):
    recipe = image_recipe(write_images(tmp_path / "data"))
    (tmp_path / "cache").write_text("a file where the folder would be")
    assert len(load_data(recipe).train) == 6
    (tmp_path / "cache").unlink()
    monkeypatch.setenv("LIVEWEIGHT_CACHE", "off")
    load_data(recipe)
    monkeypatch.setenv("LIVEWEIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(images, "WORTH", 17)
    load_data(recipe)
    assert len(cache) == 3 * 18 and not (tmp_path / "cache").exists()
