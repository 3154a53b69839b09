"""How one tensor stands in a checkpoint: as it is, as bits, or as kept values and a bit mask.

An entry is a JSON list: [checksum, codec, ...]. What is stored beside it, by codec:

    raw     key                                             the tensor
    bits    key.bits                                        bool, 1 bit each; + shape
    packed  key.values [kept], key.bitmask (1 bit each)     the rest is zero; + shape
    mask    nothing: the bool tensor is another key's bitmask; + that key
    same    nothing: the very tensor of another key; + that key

A bit mask is uint8, little-endian: position i is bit i % 8 of byte i // 8.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from liveweight._packing import pack_bits, unpack_bits
from liveweight.compress.container import checksum

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def nonzero_bits(tensor: Tensor) -> Tensor:
    """Return where any bit is set: -0.0 and NaN count, +0.0 does not."""
    return tensor.contiguous().view(_INTEGERS[tensor.element_size()]) != 0


def packing_pays(tensor: Tensor, kept: int) -> bool:
    """True where kept values and one bit per weight take less room than the tensor."""
    size = tensor.element_size()
    return tensor.is_floating_point() and kept * size + tensor.numel() / 8 < tensor.numel() * size


class Encoder:
    """Collects the stored tensors and the entries of a checkpoint."""

    def __init__(self) -> None:
        self.stored: dict[str, Tensor] = {}
        self.entries: dict[str, list] = {}
        self._places: dict[tuple, str] = {}

    def add(self, key: str, tensor: Tensor) -> None:
        """Store a tensor: bits for bool, packed where that is smaller, once where it is tied."""
        place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and self._places.setdefault(place, key) != key:
            self.entries[key] = ["", "same", self._places[place]]
            return
        tensor = tensor.detach().cpu()
        if tensor.dtype == torch.bool:
            self._put(key, ["bits", list(tensor.shape)], {"bits": pack_bits(tensor)})
            return
        keep = nonzero_bits(tensor) if tensor.is_floating_point() else None
        if keep is not None and packing_pays(tensor, int(keep.sum())):
            self.add_packed(key, tensor, keep)
        else:
            self._put(key, ["raw"], {"": tensor.clone(memory_format=torch.contiguous_format)})

    def add_packed(self, key: str, tensor: Tensor, keep: Tensor) -> None:
        """Store the kept values and the mask; what is not kept is zero."""
        tensor, keep = tensor.detach().cpu().contiguous(), keep.cpu().contiguous()
        parts = {"values": tensor[keep], "bitmask": pack_bits(keep)}
        self._put(key, ["packed", list(tensor.shape)], parts)

    def add_mask_of(self, key: str, packed_key: str) -> None:
        """Note that a bool tensor is the bit mask of a packed one."""
        self.entries[key] = ["", "mask", packed_key]

    def _put(self, key: str, entry: list, parts: dict[str, Tensor]) -> None:
        self.entries[key] = [checksum(list(parts.values())), *entry]
        for suffix, tensor in parts.items():
            name = f"{key}.{suffix}" if suffix else key
            if name in self.stored:
                raise ValueError(f"save: two tensors would be stored as {name!r}")
            self.stored[name] = tensor


_SUFFIXES = {"raw": ("",), "bits": ("bits",), "packed": ("values", "bitmask")}


class Decoder:
    """Gives back the tensors of a checkpoint and says by name which one is missing or damaged."""

    def __init__(self, path: object, entries: dict[str, list], stored: dict[str, Tensor]) -> None:
        self.path = path
        self.entries = entries
        self.stored = stored
        self.masks: dict[str, Tensor] = {}  # of packed keys

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor, tied ones once. Raises ValueError that names a damaged tensor."""
        decoded: dict[str, Tensor] = {}
        later = []
        for key, entry in self.entries.items():
            if entry[1] in ("same", "mask"):
                later.append(key)
            else:
                decoded[key] = self._decode(key, entry)
        for key in later:
            _, codec, other = self.entries[key]
            decoded[key] = decoded[other] if codec == "same" else self.masks[other]
        return {key: decoded[key] for key in self.entries}

    def _decode(self, key: str, entry: list) -> Tensor:
        digest, codec, *rest = entry
        if codec not in _SUFFIXES:
            raise ValueError(f"load: {self.path}: {key} is stored as {codec!r}, an unknown codec")
        names = [f"{key}.{suffix}" if suffix else key for suffix in _SUFFIXES[codec]]
        for name in names:
            if name not in self.stored:
                raise ValueError(f"load: {self.path} is damaged: tensor {name} is missing")
        parts = [self.stored[name] for name in names]
        if checksum(parts) != digest:
            raise ValueError(f"load: {self.path} is damaged: the checksum of {key} does not match")
        if codec == "raw":
            return parts[0]
        shape = rest[0]
        count = math.prod(shape)
        if codec == "bits":
            return unpack_bits(parts[0], count).view(shape)
        values, bits = parts
        keep = unpack_bits(bits, count)
        dense = values.new_zeros(count)
        dense[keep] = values
        self.masks[key] = keep.view(shape)
        return dense.view(shape)
