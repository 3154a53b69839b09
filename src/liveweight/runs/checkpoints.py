"""Saved models outside their run: choose kernels again for this machine, and time them."""

from __future__ import annotations

import json
import os
import pathlib

import torch
import yaml
from torch import Tensor, nn

import liveweight.nn as lwnn
from liveweight import compress
from liveweight.runs.latency import measure_latency
from liveweight.runs.listing import columns
from liveweight.runs.models import build_model
from liveweight.runs.recipe import Recipe, check_device, from_dict
from liveweight.runs.report import factor


def recompress(
    checkpoint: str,
    model: str | None,
    example: str | None,
    device: str,
    threads: int | None,
    out: str | None,
) -> str:
    """Measure and choose the kernels of a saved model again, save it, and return the report.

    example is a shape such as "64x1x28x28". ValueError: unknown model, a shape or file that does
    not fit; the file is then as it was.
    """
    source = _Source(checkpoint, model, example, device, threads)
    dense = undo_sparse_(source.load(), source.build())
    report = compress.compress_(dense, source.x)
    target = out or checkpoint
    compress.save(dense, target)
    return f"{report}\nsaved: {target}, {os.path.getsize(target):,} bytes"


def bench(
    checkpoint: str,
    model: str | None,
    example: str | None,
    device: str,
    threads: int | None,
    no_compile: bool,
) -> str:
    """Time a saved model against its dense twin in turns and return the table."""
    source = _Source(checkpoint, model, example, device, threads)
    fast = source.load()
    twin = source.build().eval()
    inputs = {len(source.x): source.x}
    tables, notes = measure_latency(twin, {"compressed": fast}, inputs, not no_compile)
    rows = [(r["name"], f"{r['median_us']:.1f}", factor(r["speedup"])) for r in tables[0]["rows"]]
    shape = "x".join(map(str, source.x.shape))
    text = columns((f"input {shape}", "median, us", "speed-up"), rows)
    about = f"{torch.get_num_threads()} threads, device {device}"
    return "\n".join([text, about, *notes])


class _Source:
    """A checkpoint, the model it belongs to and an example input, from arguments or its run."""

    def __init__(
        self,
        checkpoint: str,
        model: str | None,
        example: str | None,
        device: str,
        threads: int | None,
    ) -> None:
        self.path = pathlib.Path(checkpoint)
        if not self.path.is_file():
            raise ValueError(f"{checkpoint}: no such file")
        if threads is not None:
            torch.set_num_threads(threads)
        self.device = check_device(device)
        recipe = self._recipe_beside()
        if model is None and recipe is None:
            raise ValueError(f"{checkpoint}: no recipe.yaml beside it; say which --model it is")
        self.name = model or recipe.model.name
        # arguments belong to the recipe's own model
        self.arguments = recipe.model.arguments if recipe and model is None else {}
        self.x = torch.rand(self._shape(example), device=self.device)

    def _recipe_beside(self) -> Recipe | None:
        path = self.path.with_name("recipe.yaml")
        return from_dict(yaml.safe_load(path.read_text())) if path.is_file() else None

    def _shape(self, example: str | None) -> tuple[int, ...]:
        if example is None:
            facts = self.path.with_name("result.json")
            if not facts.is_file():
                raise ValueError("say the input's shape, such as --example 64x1x28x28")
            return (64, *json.loads(facts.read_text())["input_shape"])
        try:
            shape = tuple(int(n) for n in example.lower().replace(",", "x").split("x"))
        except ValueError:
            shape = ()
        if not shape or min(shape) < 1:
            raise ValueError(f"--example must be a shape such as 64x1x28x28, got {example!r}")
        return shape

    def build(self) -> nn.Module:
        return build_model(self.name, self.arguments, seed=0).to(self.device)

    def load(self) -> nn.Module:
        return compress.load(self.path, self.build()).eval()


def undo_sparse_(model: nn.Module, dense: nn.Module) -> nn.Module:
    """Put dense layers with the same numbers in place of sparse ones; return the model.

    dense is an instance of the class as it was built: modules that were joined into a sparse one
    (activation, pool) come back from there. BatchNorm stays folded into the weights: one that
    changes nothing takes its place.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, (lwnn.SparseLinear, lwnn.SparseConv2d)):
            for part in module.parts[1:]:
                joined = dense.get_submodule(part)
                if isinstance(joined, nn.modules.batchnorm._BatchNorm):
                    joined = _neutral_norm(joined, len(module.weight))
                _replace(model, part, joined)
            _replace(model, name, _dense_layer(module))
    return model


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new.eval())


@torch.no_grad()
def _neutral_norm(norm: nn.modules.batchnorm._BatchNorm, channels: int) -> nn.Module:
    """Return a BatchNorm of that many channels that gives back its input in evaluation mode."""
    variance: Tensor = norm.running_var
    options = {"eps": norm.eps, "momentum": norm.momentum, "affine": norm.affine}
    new = type(norm)(channels, **options, device=variance.device, dtype=variance.dtype)
    new.running_var.fill_(1 - norm.eps)
    if channels != norm.num_features:
        new.shrunk_from = {"num_features": norm.num_features, "bias": norm.affine}
    return new


@torch.no_grad()
def _dense_layer(sparse: nn.Module) -> nn.Module:
    weight: Tensor = sparse.weight
    options = {"bias": sparse.bias is not None, "device": weight.device, "dtype": weight.dtype}
    if isinstance(sparse, lwnn.SparseLinear):
        layer = nn.Linear(sparse.in_features, sparse.out_features, **options)
    else:
        keys = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
        sizes = {key: getattr(sparse, key) for key in (*keys, "groups")}
        layer = nn.Conv2d(**sizes, **options)
    layer.weight.copy_(weight)
    if sparse.bias is not None:
        layer.bias.copy_(sparse.bias)
    if hasattr(sparse, "shrunk_from"):
        layer.shrunk_from = dict(sparse.shrunk_from)  # lets the file be loaded into the full class
    return layer
