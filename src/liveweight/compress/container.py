"""One safetensors file with a JSON manifest in its header: written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import secrets
from collections.abc import Mapping

import torch
from torch import Tensor

# The key of the header's metadata under which the manifest stands.
KEY = "liveweight"
MANIFEST_VERSION = 1
_CHUNK = 1 << 24
_HEADER_LIMIT = 100 << 20  # safetensors' own bound


def checksum(tensors: list[Tensor]) -> str:
    """Return 16 hexadecimal digits of the SHA-256 over dtypes, shapes and bytes of the tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)} ".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _digest_of_manifest(manifest: Mapping) -> str:
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def serialize(tensors: Mapping[str, Tensor], manifest: Mapping) -> bytes:
    """Return the bytes of a safetensors file with these contiguous CPU tensors and the manifest."""
    import safetensors.torch  # here, so that the kernels work where it is not installed

    record = {"manifest": manifest, "sha256": _digest_of_manifest(manifest)}
    metadata = {KEY: json.dumps(record, separators=(",", ":"))}
    return safetensors.torch.save(dict(tensors), metadata)


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
    """Write the bytes beside the target, flush them to the disk, then rename over the target.

    Raises OSError that names the path; the target is then as before and nothing is left beside it.
    """
    target = pathlib.Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with open(temporary, "xb") as file:
            for start in range(0, len(data), _CHUNK):
                file.write(memoryview(data)[start : start + _CHUNK])
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
            message = f"save: cannot write the checkpoint, what was there is untouched: {reason}"
            raise OSError(error.errno, message, str(path)) from error
        raise
    _flush_folder(target.parent)


def _flush_folder(folder: pathlib.Path) -> None:
    """Make the rename itself durable, on systems that can open a folder."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read(path: str | os.PathLike) -> tuple[dict, dict[str, Tensor]]:
    """Return (manifest, stored tensors) of a checkpoint file.

    Raises ValueError that names the file and what is wrong: not safetensors, truncated, not ours,
    a newer manifest, a damaged manifest; FileNotFoundError where there is no file.
    """
    import safetensors

    size = os.path.getsize(path)
    header = _read_header(path, size)
    manifest = _read_manifest(path, header)
    ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
    expected = header_bytes(path) + max(ends, default=0)
    if size != expected:
        kind = "is truncated" if size < expected else "has bytes after its end"
        raise ValueError(f"load: {path} {kind}: {size} bytes, its header announces {expected}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return manifest, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"load: {path} is damaged: {error}") from error


def header_bytes(path: str | os.PathLike) -> int:
    """Return where the data of a safetensors file starts."""
    with open(path, "rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def _read_header(path: str | os.PathLike, size: int) -> dict:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= _HEADER_LIMIT:
            raise ValueError(f"load: {path} is not a safetensors file: it has no header")
        text = file.read(length)
    if len(text) < length and text[:1] == b"{":
        raise ValueError(f"load: {path} is truncated inside its header: {size} bytes")
    try:
        header = json.loads(text)
        for key, entry in header.items():
            if key != "__metadata__":
                int(entry["data_offsets"][1])
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"load: {path} is not a safetensors file: its header is broken") from error
    return header


def _read_manifest(path: str | os.PathLike, header: dict) -> dict:
    metadata = header.get("__metadata__") or {}
    if KEY not in metadata:
        raise ValueError(
            f"load: {path} is a safetensors file, but not a liveweight checkpoint: its header "
            f"has no {KEY!r} entry"
        )
    try:
        record = json.loads(metadata[KEY])
        manifest, digest = record["manifest"], record["sha256"]
        version = manifest["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"load: the manifest of {path} is damaged: {error}") from error
    if not isinstance(version, int) or version > MANIFEST_VERSION:
        raise ValueError(
            f"load: {path} has manifest version {version}, written by liveweight "
            f"{manifest.get('liveweight')}; this one reads up to version {MANIFEST_VERSION}"
        )
    if _digest_of_manifest(manifest) != digest:
        raise ValueError(f"load: the manifest of {path} is damaged: its checksum does not match")
    return manifest
