"""save and load: one safetensors file without pickle, as small as the pruned model is."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

from liveweight import __version__
from liveweight.compress import container, forms, structure, swap
from liveweight.compress.codec import Decoder, Encoder
from liveweight.compress.rebuild import Rebuild
from liveweight.nn import ByBatch


def save(model: nn.Module, path: str | os.PathLike) -> None:
    """Write a model's tensors and its changed structure as one safetensors file.

    size <= dense bytes x (density + 1/32) + 16 kB for float32 weights of a network of some ten
    layers: kept values and one bit per weight; other tensors stand as they are, in their dtype.
    A weight's masked entries are stored as +0.0. The header's metadata holds a JSON manifest.

    Raises TypeError for a model or path of another type and for tensors safetensors cannot hold,
    ValueError for torch.nn.utils.prune masks, OSError where the file cannot be written: what was
    at the path is then untouched.
    """
    model = _checked_model("save", model, path)
    encoder = Encoder()
    packed = _encode_sparse(model, encoder)
    hidden = packed | forms.inside_by_batch(model)
    state = {k: v for k, v in model.state_dict().items() if k.rpartition(".")[0] not in hidden}
    masks = _encode_masked(state, encoder)
    for name, module in model.named_modules():
        if name in packed and module.bias is not None:
            state[f"{name}.bias"] = module.bias
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"save: {key} is a {type(value).__name__}, only tensors can be saved")
        if key not in masks and key not in encoder.entries:
            encoder.add(key, value)
    manifest = {
        "version": container.MANIFEST_VERSION,
        "liveweight": __version__,
        "model": type(model).__qualname__,
        "modules": structure.describe(model),
        "tensors": encoder.entries,
    }
    container.write_atomically(path, container.serialize(encoder.stored, manifest))


def _checked_model(verb: str, model: nn.Module, path: object) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{verb}: model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{verb}: path must be a string or a path, got {type(path).__name__}")
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    for name, module in model.named_modules():
        if hasattr(module, "weight_orig") or hasattr(module, "bias_orig"):
            raise ValueError(
                f"{verb}: {name} carries torch.nn.utils.prune masks: make them permanent first "
                "(lw.strip_, or torch.nn.utils.prune.remove)"
            )
    return model


def _encode_sparse(model: nn.Module, encoder: Encoder) -> set[str]:
    """Store each sparse module's weight under name.weight; return the names of those modules.

    Of a layer in several forms one is stored, a sparse one where there is one.
    """
    packed = set()
    inside = forms.inside_by_batch(model)
    for name, module in model.named_modules():
        if name in inside:
            continue
        several = isinstance(module, ByBatch)
        options = list(module.choices) if several else [module]
        sparse = next((m for m in options if swap.is_sparse(m)), None)
        if sparse is None and several:
            encoder.add(f"{name}.weight", module.weight)
            packed.add(name)
        elif sparse is not None:
            weight, keep, kernels = swap.dense_weight(sparse)
            encoder.add_packed(f"{name}.weight", weight, keep)
            if kernels is not None:
                encoder.add(f"{name}.kernels", kernels.cpu())
            packed.add(name)
    return packed


def _encode_masked(state: dict[str, Tensor], encoder: Encoder) -> set[str]:
    """Store each weight whose mask holds together with its mask; return the keys stored."""
    done = set()
    for key, mask in state.items():
        base = key.removesuffix("_mask")
        weight = state.get(base)
        if base == key or not isinstance(weight, Tensor) or not isinstance(mask, Tensor):
            continue
        if mask.dtype != torch.bool or mask.shape != weight.shape:
            continue
        if weight.is_floating_point() and not bool((weight.detach()[~mask] != 0).any()):
            encoder.add_packed(base, weight, mask)
            encoder.add_mask_of(key, base)
            done |= {base, key}
    return done


def load(path: str | os.PathLike, model: nn.Module) -> nn.Module:
    """Load a checkpoint of `save` into a dense instance of the same class, in place.

    Shrunken layers take the file's sizes, sparse modules take the places they had, masks come
    back, and every tensor takes the file's values and dtype on the model's device. Nothing is
    measured again. The whole file is verified before the model is touched.

    returns  the model

    Raises TypeError for arguments of another type, FileNotFoundError, and ValueError that names
    the file, the tensor or the module that does not fit; the model is then as it was.
    """
    if isinstance(path, nn.Module):
        raise TypeError("load: path comes first, then the model: load(path, model)")
    target = _checked_model("load", model, path)
    manifest, stored = container.read(path)
    decoder = Decoder(path, manifest["tensors"], stored)
    tensors = decoder.tensors()
    name = type(target).__qualname__
    if manifest["model"] != name:
        raise ValueError(f"load: {path} holds a {manifest['model']}, the model is a {name}")
    Rebuild(path, target, manifest["modules"], tensors, decoder.masks).apply()
    return model
