"""What PackedLinear and PackedConv2d share: a dense weight and its copy in oneDNN's own layout."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_float32 = torch.float32


def can_pack(weight: Tensor) -> bool:
    """True where oneDNN can hold this weight: float32 on a CPU, with oneDNN in this torch."""
    return weight.is_cpu and weight.dtype is _float32 and torch.backends.mkldnn.is_available()


class PackedModule(nn.Module):
    """Computes with a packed copy of the weight where no gradient is asked for.

    The copy is made on the first such call. A weight that needs no gradient is given up then: the
    packed copy is the only one, and `weight` reads a dense copy of it. Writing into the weight is
    noticed, except through `.data`, which train() and eval() take note of.
    """

    activation: str | None
    packs: bool
    parts: tuple[str, ...]
    _shape: tuple[int, ...]
    _may_give_up: bool  # the weight, once it is packed
    _cache: tuple[object, Tensor] | None  # (state of the weight that was packed, packed copy)

    def _adopt(
        self, dense: nn.Module, activation: str | None, packs: bool, parts: tuple[str, ...]
    ) -> None:
        """Take over parameters and masks of a dense layer; they are shared, not copied."""
        self._parameters["weight"] = dense.weight
        self._parameters["bias"] = dense.bias
        for name in ("weight_mask", "bias_mask"):
            if dense._buffers.get(name) is not None:
                self.register_buffer(name, dense._buffers[name])
        self.activation, self.packs, self.parts = activation, packs, tuple(parts)
        self._shape = tuple(dense.weight.shape)
        self._cache, self._may_give_up = None, True
        self.train(dense.training)

    def _reorder(self, weight: Tensor, x: Tensor) -> Tensor:
        """Return the weight in oneDNN's layout for inputs like x."""
        raise NotImplementedError

    def _wants_packed(self, x: Tensor) -> bool:
        """True for a plain float32 CPU input of a call that records no gradient."""
        if not self.packs or torch.compiler.is_compiling():
            return False
        if type(x) is not Tensor or x.dtype is not _float32 or not x.is_cpu or not x.numel():
            return False
        if torch.is_autocast_enabled("cpu"):
            return False
        if not torch.is_grad_enabled():
            return True
        needed = any(p is not None and p.requires_grad for p in self._parameters.values())
        return not (x.requires_grad or needed)

    def _packed(self, x: Tensor) -> Tensor | None:
        """Return the packed weight, made anew where the weight has changed."""
        weight, cache = self._parameters.get("weight"), self._cache
        if weight is None:
            return cache[1]
        state = None if weight.is_inference() else (weight._version, weight.data_ptr())
        if cache is not None and cache[0] == state:
            return cache[1]
        if not can_pack(weight):
            return None
        with torch.inference_mode(False), torch.no_grad():
            packed = self._reorder(weight.detach(), x)
        self._cache = (state, packed)
        if self._may_give_up and not weight.requires_grad:
            self._parameters.pop("weight", None)  # another thread may have been here
        return packed

    @property
    def is_packed_only(self) -> bool:
        """True where the packed copy is all there is of the weight."""
        return "weight" not in self._parameters

    def unpack_(self) -> None:
        """Make the weight a parameter again; the packed copy goes."""
        if self.is_packed_only:
            with torch.inference_mode(False), torch.no_grad():
                weight = nn.Parameter(self._dense(), requires_grad=False)
            self._parameters = {"weight": weight, **self._parameters}
        self._cache = None

    def _dense(self) -> Tensor:
        return self._cache[1].to_dense().reshape(self._shape)

    @torch.compiler.assume_constant_result
    def _keep_weight(self) -> bool:
        """Hold the weight as a parameter from now on: a compiler can read nothing else."""
        if self.is_packed_only:
            self.unpack_()
        self._may_give_up = False
        return True

    def _weight(self) -> Tensor:
        if torch.compiler.is_compiling():
            self._keep_weight()  # runs while tracing, before the weight is looked up
        return self.weight

    def __getattr__(self, name: str) -> object:
        if name == "weight" and self.__dict__.get("_cache") is not None and self.is_packed_only:
            return self._dense()
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, object]:
        state = {**self.__dict__, "_cache": None}
        if self.is_packed_only:
            weight = nn.Parameter(self._dense(), requires_grad=False)
            state["_parameters"] = {"weight": weight, **self._parameters}
        return state

    def train(self, mode: bool = True) -> PackedModule:
        """Set the mode; in training mode the weight is a parameter."""
        if mode or not self.is_packed_only:
            self.unpack_()
        return super().train(mode)

    def requires_grad_(self, requires_grad: bool = True) -> PackedModule:
        """Set whether gradients are recorded for weight and bias."""
        self.unpack_()
        return super().requires_grad_(requires_grad)

    def _apply(self, fn, recurse: bool = True) -> PackedModule:
        self.unpack_()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        if self.is_packed_only:
            destination[prefix + "weight"] = self._dense()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        self.unpack_()
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _joined_relu(self, y: Tensor) -> Tensor:
        return torch.relu(y) if y.requires_grad else torch.relu_(y)

    def _describe(self) -> str:
        text = "packed for oneDNN" if self.packs else "not packed"
        if self.activation is not None:
            text += f", activation={self.activation}"
        return text + (f", parts={self.parts}" if self.parts else "")
