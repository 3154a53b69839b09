"""save and load: bit-equal, small, whole or refused by name of what is wrong."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn.utils import prune

from liveweight.compress import load, save, shrink_


def bits_equal(a, b):
    same_type = a.dtype == b.dtype and a.shape == b.shape
    if not same_type or a.numel() == 0:
        return same_type
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def states_equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(bits_equal(a[k], b[k]) for k in a)


def rewrite(path, change):
    """Change the header (a dict) and the data (a bytearray) of a safetensors file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    body = change(header, body) or body
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.safetensors"


@pytest.fixture
def pruned(nets):
    return nets.sparsify(nets.settle(nets.LeNet()), 0.15)


@pytest.mark.parametrize("density", [0.0, 0.03, 0.5, 1.0])
@pytest.mark.parametrize("masks", [True, False])
def test_round_trip_is_bit_equal(nets, path, density, masks):
    model = nets.sparsify(nets.settle(nets.LeNet()), density, masks)
    save(model, path)
    fresh = nets.LeNet()
    assert load(path, fresh) is fresh
    assert states_equal(model, fresh)
    x = torch.randn(2, 1, 16, 16)
    assert torch.equal(model(x), fresh.eval()(x))


def test_every_dtype_and_value_survives(path):
    model = nn.Module()
    odd = torch.tensor([0.0, -0.0, float("nan"), float("inf"), 1e-45, 0.0, 0.0, 0.0] * 20)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        model.register_buffer("of_" + str(dtype)[6:], odd.to(dtype))
    for dtype in (torch.int64, torch.int32, torch.uint8, torch.bool):
        model.register_buffer("of_" + str(dtype)[6:], torch.arange(40).to(dtype).view(5, 8))
    model.register_buffer("scalar", torch.tensor(3))
    model.register_buffer("empty", torch.empty(0, 4))
    model.register_buffer("turned", torch.randn(3, 5).T)
    save(model, path)
    fresh = nn.Module()
    for name, value in model.named_buffers():
        fresh.register_buffer(name, torch.zeros_like(value, memory_format=torch.contiguous_format))
    load(path, fresh)
    assert states_equal(model, fresh)


def test_size_is_density_plus_one_bit_per_weight(nets, path):
    for density in (0.02, 0.1, 0.6):
        model = nets.sparsify(nets.LeNet(width=32), density)
        dense_bytes = 4 * nets.size(model)
        kept = sum(int((p != 0).sum()) for p in model.parameters())
        save(model, path)
        limit = dense_bytes * (kept / nets.size(model) + 1 / 32) + 16_000
        assert path.stat().st_size <= limit


def test_kept_zeros_and_stale_masks(nets, path):
    model = nets.sparsify(nets.FunctionalNet(), 0.5)
    first = model.fc1.weight_mask.nonzero()[0]
    model.fc1.weight.data[tuple(first)] = 0.0  # kept, and zero
    model.fc2.weight.data.fill_(1.0)  # the mask does not hold: both must survive
    save(model, path)
    fresh = load(path, nets.FunctionalNet())
    assert states_equal(model, fresh)
    assert fresh.fc1.weight_mask[tuple(first)]


def test_shrunken_model_loads_into_a_dense_instance(nets, path):
    model = nets.settle(nets.NormNet())
    with torch.no_grad():
        model.conv1.weight[[1, 4]] = 0.0
        model.head.weight[:, :4] = 0.0
    x = torch.randn(2, 3, 8, 8)
    nets.sparsify(model.head, 0.5)
    shrink_(model, x)
    save(model, path)
    fresh = load(path, nets.NormNet()).eval()
    assert fresh.conv1.out_channels == fresh.bn1.num_features == fresh.conv2.in_channels == 6
    assert states_equal(model, fresh)
    assert torch.equal(model(x), fresh(x))
    save(fresh, path)  # and again, from what was loaded
    assert states_equal(model, load(path, nets.NormNet()))


def test_added_bias_travels(nets, path):
    model = nets.settle(nets.FunctionalNet(bias=False))
    with torch.no_grad():
        model.fc1.weight[4] = 0.0
        model.fc1.bias[4] = 2.0
    x = torch.randn(2, 12)
    shrink_(model, x)
    save(model, path)
    fresh = load(path, nets.FunctionalNet(bias=False))
    assert torch.equal(model(x), fresh(x))


def test_half_precision_stays(nets, path, pruned):
    save(pruned.to(torch.bfloat16), path)
    assert states_equal(pruned, load(path, nets.LeNet()))


def test_tied_weights_are_stored_once_and_stay_tied(path):
    def build():
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        model[1].weight = model[0].weight
        return model

    model = build()
    save(model, path)
    assert path.stat().st_size < 1.2 * 64 * 64 * 4
    fresh = load(path, build())
    assert states_equal(model, fresh) and fresh[0].weight is fresh[1].weight
    fresh = load(path, build().double())
    assert states_equal(model, fresh) and fresh[0].weight is fresh[1].weight


def test_parameters_keep_their_identity_where_shapes_allow(nets, path, pruned):
    save(pruned, path)
    fresh = nets.LeNet()
    weight = fresh.classifier[1].weight
    fresh.classifier[3].weight.requires_grad_(False)
    load(path, fresh)
    assert fresh.classifier[1].weight is weight
    assert not fresh.classifier[3].weight.requires_grad


FRESH_PROCESS = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("compress_nets", sys.argv[1])
nets = importlib.util.module_from_spec(spec)
spec.loader.exec_module(nets)
import liveweight.compress as compress
model = compress.load(sys.argv[2], nets.LeNet()).eval()
data = torch.load(sys.argv[3], weights_only=True)
torch.set_num_threads(data["threads"])
assert torch.equal(model(data["x"]), data["y"]), "outputs differ"
"""


def in_fresh_process(nets, path, model, folder):
    x = torch.randn(4, 1, 16, 16)
    data = folder / "data.pt"
    torch.save({"x": x, "y": model.eval()(x), "threads": torch.get_num_threads()}, data)
    command = [sys.executable, "-c", FRESH_PROCESS, nets.__file__, str(path), str(data)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_fresh_process_gives_equal_bits(nets, path, pruned, tmp_path):
    save(pruned, path)
    done = in_fresh_process(nets, path, pruned, tmp_path)
    assert done.returncode == 0, done.stderr


def test_no_pickle_and_a_manifest(path, pruned):
    save(pruned, path)
    with safetensors.safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()["liveweight"])
    manifest = record["manifest"]
    assert manifest["version"] == 1 and manifest["model"] == "LeNet"
    assert b"pickle" not in path.read_bytes() and not path.read_bytes().startswith(b"PK")


# Damaged and foreign files


def test_missing_file(nets, path):
    with pytest.raises(FileNotFoundError):
        load(path, nets.LeNet())


@pytest.mark.parametrize("content", [b"", b"1234", b"hello world, not tensors", b"\xff" * 4000])
def test_not_safetensors(nets, path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a safetensors file"):
        load(path, nets.LeNet())


def test_pickle_file(nets, path, pruned):
    torch.save(pruned.state_dict(), path)
    with pytest.raises(ValueError, match="not a safetensors file"):
        load(path, nets.LeNet())


def test_foreign_safetensors(nets, path, pruned):
    safetensors.torch.save_file(dict(nets.LeNet().state_dict()), path)
    with pytest.raises(ValueError, match="not a liveweight checkpoint"):
        load(path, nets.LeNet())


@pytest.mark.parametrize("share", [0.05, 0.5, 0.999])
def test_truncated(nets, path, pruned, share):
    save(pruned, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match="truncated"):
        load(path, nets.LeNet())


def test_bytes_after_the_end(nets, path, pruned):
    save(pruned, path)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ValueError, match="bytes after its end"):
        load(path, nets.LeNet())


def test_flipped_bit_names_the_tensor(nets, path, pruned):
    save(pruned, path)

    def flip(header, body):
        start, _ = header["classifier.1.weight.values"]["data_offsets"]
        body[start + 5] ^= 1

    rewrite(path, flip)
    with pytest.raises(ValueError, match=r"checksum of classifier\.1\.weight does not match"):
        load(path, nets.LeNet())


def test_missing_tensor(nets, path, pruned):
    save(pruned, path)

    def rename(header, body):
        header["other"] = header.pop("classifier.1.weight.bitmask")

    rewrite(path, rename)
    with pytest.raises(ValueError, match=r"classifier\.1\.weight\.bitmask is missing"):
        load(path, nets.LeNet())


def edit_manifest(path, **changes):
    def change(header, body):
        record = json.loads(header["__metadata__"]["liveweight"])
        record["manifest"].update(changes)
        header["__metadata__"]["liveweight"] = json.dumps(record)

    rewrite(path, change)


def test_newer_manifest(nets, path, pruned):
    save(pruned, path)
    edit_manifest(path, version=7, liveweight="3.2")
    with pytest.raises(ValueError, match=r"version 7, written by liveweight 3\.2.*up to version 1"):
        load(path, nets.LeNet())


def test_damaged_manifest(nets, path, pruned):
    save(pruned, path)
    edit_manifest(path, model="LeNext")
    with pytest.raises(ValueError, match=r"manifest of .* is damaged"):
        load(path, nets.LeNet())


# The wrong model: named, and left as it was


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda nets: nets.FunctionalNet(), "holds a LeNet, the model is a FunctionalNet"),
        (lambda nets: nets.LeNet(width=4), r"features\.0\.weight is \(8, 1, 3, 3\), expected \(4,"),
    ],
)
def test_wrong_model(nets, path, pruned, build, words):
    save(pruned, path)
    model = build(nets)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        load(path, model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_shrunken_file_wants_the_original_sizes(nets, path):
    model = nets.settle(nets.LeNet())
    with torch.no_grad():
        model.features[3].weight[:, 2] = 0.0
    shrink_(model, torch.randn(1, 1, 16, 16))
    save(model, path)
    with pytest.raises(ValueError, match=r"features\.0 has out_channels 4, expected 8"):
        load(path, nets.LeNet(width=4))


def test_extra_and_absent_tensors_are_named(nets, path, pruned):
    save(pruned, path)
    model = nets.LeNet()
    model.register_buffer("scale", torch.ones(1))
    with pytest.raises(ValueError, match="no tensor for scale"):
        load(path, model)
    pruned.register_buffer("shift", torch.ones(1))
    save(pruned, path)
    with pytest.raises(ValueError, match="it has no tensor shift"):
        load(path, nets.LeNet())


def test_bad_arguments(nets, path, pruned):
    with pytest.raises(TypeError, match="path comes first"):
        load(nets.LeNet(), path)
    with pytest.raises(TypeError, match="must be an nn.Module, got dict"):
        save({}, path)
    with pytest.raises(TypeError, match="path must be a string or a path, got int"):
        save(pruned, 3)
    with pytest.raises(ValueError, match="features.0 carries torch.nn.utils.prune masks"):
        prune.identity(pruned.features[0], "weight")
        save(pruned, path)


# Full disks and other failures while writing


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_keeps_the_old_file(path, pruned, monkeypatch, call):
    save(pruned, path)
    before = path.read_bytes()
    monkeypatch.setattr(f"liveweight.compress.container.os.{call}", no_space)
    with pytest.raises(OSError, match="No space left") as caught:
        save(pruned, path)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_write_that_fails_halfway(nets, path):
    """A real failing write: the process may write no more than 4 kB into one file."""
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(OSError, match="what was there is untouched"):
            save(nets.LeNet(), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == b"old" and os.listdir(path.parent) == [path.name]


def test_no_such_folder_and_a_folder_as_target(nets, tmp_path):
    with pytest.raises(FileNotFoundError, match="cannot write the checkpoint"):
        save(nets.LeNet(), tmp_path / "absent" / "net.safetensors")
    with pytest.raises(IsADirectoryError):
        save(nets.LeNet(), tmp_path)
    assert os.listdir(tmp_path) == []


def test_symbolic_link_stays_a_link(nets, tmp_path, pruned):
    real, link = tmp_path / "real.safetensors", tmp_path / "link.safetensors"
    link.symlink_to(real)
    save(pruned, str(link))
    assert link.is_symlink() and pathlib.Path(real).stat().st_size > 0
    assert states_equal(pruned, load(link, nets.LeNet()))
