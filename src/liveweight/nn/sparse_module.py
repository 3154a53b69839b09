"""What SparseLinear and SparseConv2d share: their tensors, loading them, reading dense layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from liveweight import _library
from liveweight.formats import Kernelwise, Unstructured


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


def check_format(owner: str, name: str, only: str) -> None:
    """Raise ValueError unless the format is "auto" or the only one that the module has."""
    if name not in ("auto", only):
        raise ValueError(f"{owner}: format must be 'auto' or {only!r}, got {name!r}")


class SparseModule(nn.Module):
    """Holds a weight of one format: values as a parameter, indices as buffers."""

    format: str
    op: str
    index_names: tuple[str, str]

    def __init__(
        self,
        weight: Unstructured | Kernelwise,
        bias: Tensor | None,
        activation: str | None,
        parts: tuple[str, ...],
    ) -> None:
        super().__init__()
        weight.validate()
        self.weight_shape = tuple(weight.shape)
        self.activation = activation
        self.parts = tuple(parts)
        self.values = nn.Parameter(weight.values.detach().clone())
        for name in self.index_names:
            self.register_buffer(name, getattr(weight, name))
        if bias is None:
            self.register_parameter("bias", None)
            return
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{type(self).__name__}: expected bias [{weight.shape[0]}], got {tuple(bias.shape)}"
            )
        self.bias = nn.Parameter(bias.detach().clone().to(weight.values.dtype))

    def pack(self) -> Unstructured | Kernelwise:
        """Return the weight as a value of its format; it shares the module's tensors."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """A dense copy of the weight, with gradient to the values."""
        return self.pack().to_dense()

    @property
    def density(self) -> float:
        """Fraction of entries (of a convolution: kernels) that is stored, in [0, 1]."""
        return self.pack().density

    @property
    def sparsity(self) -> float:
        """One minus the density."""
        return 1.0 - self.density

    def _backend(self) -> str:
        device = self.values.device.type
        if device == "cpu" and self.values.dtype != torch.float32:
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
            kind = type(self.pack())
            kind(shape=self.weight_shape, **given).validate()
        except (TypeError, ValueError) as error:
            return str(error)
        return None
