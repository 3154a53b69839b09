"""PackedLinear: nn.Linear with its weight in the layout that oneDNN computes in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liveweight.nn.packed_module import PackedModule

# activation -> (oneDNN's name, its algorithm, the plain function)
_ACTIVATIONS = {
    None: ("none", "", lambda y: y),
    "relu": ("relu", "", torch.relu),
    "gelu": ("gelu", "none", F.gelu),
    "gelu_tanh": ("gelu", "tanh", lambda y: F.gelu(y, approximate="tanh")),
}
_NO_SCALARS: list = []


class PackedLinear(PackedModule, nn.Linear):
    """Dense nn.Linear for inference on a CPU, y = act(x W^T + b), W packed once for oneDNN.

    x           [..., in_features] float32; other dtypes, devices and calls that record gradients
                run as nn.Linear does
    returns     [..., out_features] like x
    weight      [out_features, in_features], bias [out_features] or None
    activation  None, "relu", "gelu" or "gelu_tanh", applied to the output
    packs       False: computes as nn.Linear does, with the activation joined
    parts       names of the modules that this one stands for, where several were joined

    Raises what nn.Linear raises; from_dense raises TypeError and ValueError.
    """

    @classmethod
    def from_dense(
        cls,
        linear: nn.Linear,
        *,
        activation: str | None = None,
        packs: bool = True,
        parts: tuple[str, ...] = (),
    ) -> PackedLinear:
        """Return a module with the parameters and the mode of linear; they are shared.

        Raises TypeError for another module and ValueError for an unknown activation.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"PackedLinear: expected an nn.Linear, got {type(linear).__name__}")
        if activation not in _ACTIVATIONS:
            known = ", ".join(map(repr, _ACTIVATIONS))
            raise ValueError(f"PackedLinear: activation must be one of {known}, got {activation!r}")
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module.in_features, module.out_features = linear.in_features, linear.out_features
        module._adopt(linear, activation, packs, parts)
        return module

    def _reorder(self, weight: Tensor, x: Tensor) -> Tensor:
        rows = x.numel() // self.in_features
        return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)

    def forward(self, x: Tensor) -> Tensor:
        """Return act(x W^T + b) [..., out_features] for x [..., in_features]."""
        if self._wants_packed(x) and x.shape[-1:] == (self.in_features,):
            packed = self._packed(x)
            if packed is not None:
                name, algorithm, _ = _ACTIVATIONS[self.activation]
                bias = self._parameters["bias"]
                return _linear(x, packed, bias, name, _NO_SCALARS, algorithm)
        y = F.linear(x, self._weight(), self.bias)
        if self.activation == "relu":
            return self._joined_relu(y)
        return _ACTIVATIONS[self.activation][2](y)

    def extra_repr(self) -> str:
        """Sizes and what is packed and joined."""
        return f"{super().extra_repr()}, {self._describe()}"


_linear = torch.ops.mkldnn._linear_pointwise.default if hasattr(torch.ops, "mkldnn") else None
