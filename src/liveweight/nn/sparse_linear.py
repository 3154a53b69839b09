"""SparseLinear: nn.Linear without the weights that are zero."""

from __future__ import annotations

from types import MappingProxyType

from torch import Tensor, nn

from liveweight.formats import Unstructured
from liveweight.nn.sparse_module import SparseModule, find_format, read_dense
from liveweight.ops.activation import activation_code
from liveweight.ops.unstructured_linear import apply_unstructured

_DEFAULT = "unstructured"


class SparseLinear(SparseModule):
    """Weight-sparse (not activation-sparse) drop-in for nn.Linear: y = act(x W^T + b).

    x        [..., in_features] float32 (other dtypes run in plain PyTorch)
    returns  [..., out_features] like x

    values       Parameter: the kept weights, in the order of the format
    bias         Parameter [out_features] or None
    activation   None, "relu", "gelu" or "gelu_tanh", applied to the output
    parts        names of the modules that this one stands for, where several were joined

    Raises ValueError (shapes, names) and TypeError (types, dtypes).
    """

    formats = MappingProxyType({"unstructured": Unstructured})
    ops = MappingProxyType({"unstructured": "unstructured_linear"})

    def __init__(
        self,
        weight: Unstructured,
        bias: Tensor | None = None,
        *,
        activation: str | None = None,
        parts: tuple[str, ...] = (),
    ) -> None:
        activation_code(activation)
        super().__init__(weight, bias, activation, parts)
        self.out_features, self.in_features = weight.shape
        self.tile = weight.tile

    @classmethod
    def from_dense(
        cls,
        linear: nn.Linear,
        format: str = "auto",
        *,
        activation: str | None = None,
        mask: Tensor | None = None,
    ) -> SparseLinear:
        """Return a module with the numbers of linear; zeros of its weight are not stored.

        format  "auto" or "unstructured"
        mask    bool like weight: what is stored, zeros included; default: what is not zero

        Masks of torch.nn.utils.prune and mask buffers are applied first. The new module is in the
        mode (training or not) of linear and its tensors are copies.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"SparseLinear: expected an nn.Linear, got {type(linear).__name__}")
        kind = find_format("SparseLinear", _DEFAULT if format == "auto" else format, cls.formats)
        weight = kind.from_dense(read_dense(linear, "weight"), mask)
        module = cls(weight, read_dense(linear, "bias"), activation=activation)
        return module.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return act(x W^T + b) [..., out_features] for x [..., in_features]."""
        # Looked up in their dicts: nn.Module's attribute lookup costs a microsecond each.
        parameters, buffers = self._parameters, self._buffers
        return apply_unstructured(
            x,
            parameters["values"],
            buffers["columns"],
            buffers["segments"],
            buffers["offsets"],
            self.tile,
            self.weight_shape,
            parameters["bias"],
            activation_code(self.activation),
        )

    def extra_repr(self) -> str:
        """Sizes, sparsity, format and backend."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, {self._describe()}"
