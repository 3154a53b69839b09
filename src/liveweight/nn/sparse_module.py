"""What SparseLinear and SparseConv2d share: their tensors, loading them, reading dense layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from liveweight import _library
from liveweight.formats.pattern import PackedWeight


def read_dense(module: nn.Module, name: str) -> Tensor | None:
    """Return the effective weight or bias of a dense layer: the parameter under its mask, if any.

    Understands torch.nn.utils.prune (name_orig beside name_mask), mask buffers beside the parameter
    and torch.nn.utils.parametrize.
    """
    value = getattr(module, f"{name}_orig", None)
    if value is None:
        value = getattr(module, name)
    mask = getattr(module, f"{name}_mask", None)
    if value is None:
        return None
    value = value.detach()
    return value if mask is None else torch.where(mask.bool(), value, 0)


def find_format(owner: str, name: str, formats: Mapping[str, type]) -> type:
    """Return the class of a format by its name; raise ValueError for names that are not known."""
    if name not in formats:
        known = ", ".join(map(repr, ["auto", *formats]))
        raise ValueError(f"{owner}: format must be one of {known}, got {name!r}")
    return formats[name]


class SparseModule(nn.Module):
    """Holds a weight of some format: values as a parameter, indices as buffers, the rest as is."""

    formats: Mapping[str, type]  # name -> class of the weights that the module takes
    ops: Mapping[str, str]  # name -> op that serves it

    def __init__(
        self,
        weight: PackedWeight,
        bias: Tensor | None,
        activation: str | None,
        parts: tuple[str, ...],
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        if type(weight) not in self.formats.values():
            known = " or ".join(f"formats.{kind.__name__}" for kind in self.formats.values())
            raise TypeError(
                f"{owner}: weight must be {known}, got {type(weight).__name__}; "
                f"{owner}.from_dense takes a dense layer"
            )
        weight.validate()
        self.format = weight.name
        self.weight_shape = tuple(weight.shape)
        self.activation = activation
        self.parts = tuple(parts)
        fields = {f.name: getattr(weight, f.name) for f in dataclasses.fields(weight)}
        self.values = nn.Parameter(fields.pop("values").detach().clone())
        self.index_names = tuple(n for n, v in fields.items() if isinstance(v, Tensor))
        for name in self.index_names:
            self.register_buffer(name, fields.pop(name))
        self._fixed = fields  # sizes: what is neither values nor indices
        if bias is None:
            self.register_parameter("bias", None)
            return
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{owner}: expected bias [{weight.shape[0]}], got {tuple(bias.shape)}")
        self.bias = nn.Parameter(bias.detach().clone().to(weight.values.dtype))

    def pack(self) -> PackedWeight:
        """Return the weight as a value of its format; it shares the module's tensors."""
        index = {name: getattr(self, name) for name in self.index_names}
        return self.formats[self.format](values=self.values, **index, **self._fixed)

    @property
    def op(self) -> str:
        """Name of the op that computes this module."""
        return self.ops[self.format]

    @property
    def weight(self) -> Tensor:
        """A dense copy of the weight, with gradient to the values."""
        return self.pack().to_dense()

    @property
    def density(self) -> float:
        """Fraction of entries, kernels or blocks, whatever the format lists, that is stored."""
        return self.pack().density

    @property
    def sparsity(self) -> float:
        """One minus the density."""
        return 1.0 - self.density

    def _backend(self) -> str:
        device = self.values.device.type
        if device == "cpu" and self.values.dtype not in (torch.float32, torch.bfloat16):
            return "reference"
        return _library.backends()[self.op].get(device, "reference")

    def _describe(self) -> str:
        text = f"sparsity={self.sparsity:.4g}, format={self.format}, backend={self._backend()}"
        if self.activation is not None:
            text += f", activation={self.activation}"
        return text + (f", parts={self.parts}" if self.parts else "")

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors
    ) -> None:
        """Load all tensors or, if the state is of another pattern or broken, none."""
        problem = self._find_problem(state_dict, prefix)
        if problem is not None:
            errors.append(f"{prefix.rstrip('.') or type(self).__name__}: {problem}")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing, unexpected, errors
        )

    def _find_problem(self, state_dict, prefix: str) -> str | None:
        given = {n: state_dict.get(prefix + n) for n in ("values", *self.index_names)}
        if any(tensor is None for tensor in given.values()):
            return None  # the usual message about missing keys follows
        for name, tensor in given.items():
            here = getattr(self, name)
            if tensor.shape != here.shape:
                return (
                    f"the state's {name} has shape {tuple(tensor.shape)}, expected "
                    f"{tuple(here.shape)}: this module was built for another pattern; "
                    "build it with from_dense from a weight with the state's zeros"
                )
        try:
            self.formats[self.format](**given, **self._fixed).validate()
        except (TypeError, ValueError) as error:
            return str(error)
        return None
