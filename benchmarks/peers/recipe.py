"""A net as a list of ONNX nodes and arrays, written without the onnx package.

The peers' environment has onnx but no torch, this one torch but no onnx: the nodes travel as JSON
beside an .npz of weights. Knows the operations of benchmarks/nets.py; BatchNorm is folded first.
"""

from __future__ import annotations

import copy
import json
import operator
import pathlib

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse


class Recipe:
    """Nodes (operator, inputs, output, attributes) and the arrays that they read."""

    def __init__(self) -> None:
        self.nodes: list[dict] = []
        self.arrays: dict[str, numpy.ndarray] = {}

    def constant(self, value: object, dtype=numpy.float32) -> str:
        name = f"c{len(self.arrays)}"
        value = value.detach().numpy() if isinstance(value, Tensor) else value
        self.arrays[name] = numpy.ascontiguousarray(value, dtype=dtype)
        return name

    def add(self, op: str, inputs: list[str], **attributes) -> str:
        name = f"v{len(self.nodes)}"
        node = {"op": op, "inputs": inputs, "output": name, "attributes": attributes}
        self.nodes.append(node)
        return name

    def linear(self, x: str, layer: nn.Linear) -> str:
        y = self.add("MatMul", [x, self.constant(layer.weight.t())])
        return y if layer.bias is None else self.add("Add", [y, self.constant(layer.bias)])

    def conv(self, x: str, layer: nn.Conv2d) -> str:
        inputs = [x, self.constant(layer.weight)]
        inputs += [] if layer.bias is None else [self.constant(layer.bias)]
        pads = [*layer.padding, *layer.padding]
        sizes = {"strides": list(layer.stride), "kernel_shape": list(layer.kernel_size)}
        return self.add("Conv", inputs, pads=pads, **sizes)

    def layer_norm(self, x: str, layer: nn.LayerNorm) -> str:
        centred = self.add("Sub", [x, self.add("ReduceMean", [x], axes=[-1], keepdims=1)])
        square = self.add("Pow", [centred, self.constant(2.0)])
        variance = self.add("ReduceMean", [square], axes=[-1], keepdims=1)
        root = self.add("Sqrt", [self.add("Add", [variance, self.constant(layer.eps)])])
        scaled = self.add("Mul", [self.add("Div", [centred, root]), self.constant(layer.weight)])
        return self.add("Add", [scaled, self.constant(layer.bias)])

    def gelu(self, x: str) -> str:
        erf = self.add("Erf", [self.add("Div", [x, self.constant(2.0**0.5)])])
        product = self.add("Mul", [x, self.add("Add", [erf, self.constant(1.0)])])
        return self.add("Mul", [product, self.constant(0.5)])

    def attention(self, query: str, key: str, value: str, width: int) -> str:
        """Return softmax(q k^T / sqrt(width)) v over [B, heads, T, width]."""
        scores = self.add("MatMul", [query, self.add("Transpose", [key], perm=[0, 1, 3, 2])])
        scaled = self.add("Div", [scores, self.constant(width**0.5)])
        return self.add("MatMul", [self.add("Softmax", [scaled], axis=-1), value])

    def reshape(self, x: str, shape: tuple[int, ...]) -> str:
        return self.add("Reshape", [x, self.constant(list(shape), numpy.int64)])


def _module(recipe: Recipe, layer: nn.Module, x: str, shape: tuple[int, ...]) -> str:
    if isinstance(layer, nn.Linear):
        return recipe.linear(x, layer)
    if isinstance(layer, nn.Conv2d):
        return recipe.conv(x, layer)
    if isinstance(layer, nn.LayerNorm):
        return recipe.layer_norm(x, layer)
    if isinstance(layer, nn.ReLU):
        return recipe.add("Relu", [x])
    if isinstance(layer, nn.GELU):
        return recipe.gelu(x)
    if isinstance(layer, nn.MaxPool2d):
        sizes = [layer.kernel_size] * 2
        return recipe.add("MaxPool", [x], kernel_shape=sizes, strides=sizes)
    if isinstance(layer, nn.AdaptiveAvgPool2d):
        return recipe.add("GlobalAveragePool", [x])
    if isinstance(layer, nn.Flatten):
        return recipe.reshape(x, shape)
    raise NotImplementedError(f"recipe: no rule for {type(layer).__name__}")


def _function(recipe: Recipe, node: fx.Node, names: dict) -> str:
    inputs = [names[a] for a in node.all_input_nodes]
    shape = tuple(node.meta["shape"])
    if node.target in (operator.add, torch.add):
        return recipe.add("Add", [names[a] for a in node.args[:2]])
    if node.target is F.scaled_dot_product_attention:
        return recipe.attention(*(names[a] for a in node.args[:3]), shape[-1])
    if node.target in ("unflatten", "flatten", torch.flatten):
        return recipe.reshape(inputs[0], shape)
    if node.target == "transpose":
        first, second = (d % len(shape) for d in node.args[1:])
        order = list(range(len(shape)))
        order[first], order[second] = second, first
        return recipe.add("Transpose", inputs, perm=order)
    if node.target == "mean":
        return recipe.add("ReduceMean", inputs, axes=[node.args[1]], keepdims=0)
    raise NotImplementedError(f"recipe: no rule for {node.target}")


class _Shapes(fx.Interpreter):
    """Runs a net once and notes every node's shape."""

    def run_node(self, node: fx.Node):
        result = super().run_node(node)
        node.meta["shape"] = result.shape
        return result


def write(model: nn.Module, x: Tensor, folder: pathlib.Path) -> None:
    """Write recipe.json, weights.npz and x.npy for this input, and y.npy, what torch computes."""
    model = copy.deepcopy(model).eval()
    traced = fuse(model)  # folds BatchNorm into the convolutions before it
    with torch.no_grad():
        _Shapes(traced).run(x)
        expected = model(x)
    recipe, names = Recipe(), {}
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            names[node] = "x"
        elif node.op == "get_attr":
            names[node] = recipe.constant(operator.attrgetter(node.target)(traced))
        elif node.op == "call_module":
            layer, source = traced.get_submodule(node.target), names[node.args[0]]
            names[node] = _module(recipe, layer, source, tuple(node.meta["shape"]))
        elif node.op in ("call_function", "call_method"):
            names[node] = _function(recipe, node, names)
        else:
            output = names[node.args[0]]
    folder.mkdir(parents=True, exist_ok=True)
    about = {"nodes": recipe.nodes, "input": list(x.shape), "output": list(expected.shape)}
    (folder / "recipe.json").write_text(json.dumps(about | {"result": output}))
    numpy.savez(folder / "weights.npz", **recipe.arrays)
    numpy.save(folder / "x.npy", x.numpy())
    numpy.save(folder / "y.npy", expected.numpy())
