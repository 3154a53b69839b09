"""Keep pruned weights at zero while an optimizer trains the rest."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from liveweight.prune.mask import module_masks

# Whole numbers as wide as a float: clearing its bits is setting it to zero.
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Zeros:
    """Where one parameter is zero, and the fast way to make a tensor of its shape zero there.

    masked_fill_ takes a branch per entry on CPUs: 5 ms for 400,000 of them, where a bitwise "and"
    takes 0.3 ms. Both set NaN and infinity to zero too, which a product with the mask does not.
    """

    def __init__(self, mask: Tensor, like: Tensor) -> None:
        self.mask, self.version = mask, mask._version
        self._dropped = ~mask.bool()
        self._bits: Tensor | None = None
        if like.device.type == "cpu" and like.element_size() in _BITS:
            self._bits = torch.empty_like(like, dtype=_BITS[like.element_size()])
            self._bits.copy_(mask.bool()).neg_()  # kept: all bits set

    def stands_for(self, mask: Tensor) -> bool:
        return self.mask is mask and self.version == mask._version

    def clear_(self, tensor: Tensor) -> None:
        bits = self._bits
        fits = bits is not None and tensor.device == bits.device and tensor.layout == torch.strided
        if fits and tensor.element_size() == bits.element_size():
            tensor.detach().view(bits.dtype).bitwise_and_(bits)
        else:
            tensor.masked_fill_(self._dropped, 0)


class MaskKeeper:
    """Handle of `keep_masks`: `remove()` takes its hooks off the optimizer."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model = model
        self._owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        # Both hold the tensors themselves: an id alone may come again after the tensor is gone.
        self._zeros: dict[int, _Zeros] = {}
        self._cleared: dict[int, list[object]] = {}  # zeros and the state they were set in
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def remove(self) -> None:
        """Stop keeping the masks; what is zero now stays zero until the next step."""
        for handle in self._handles:
            handle.remove()

    def _masked(self) -> Iterator[tuple[nn.Parameter, _Zeros]]:
        """Yield (parameter, its zeros); masks may change between steps."""
        for module in self._model.modules():
            for _, parameter, mask in module_masks(module):
                if id(parameter) not in self._owned:
                    continue
                zeros = self._zeros.get(id(parameter))
                if zeros is None or not zeros.stands_for(mask):
                    zeros = self._zeros[id(parameter)] = _Zeros(mask, parameter)
                yield parameter, zeros

    @torch.no_grad()
    def _before(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        for parameter, zeros in self._masked():
            if parameter.grad is not None:
                zeros.clear_(parameter.grad)

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        # A closure computes its gradients inside the step, after _before: state is not clean then.
        closure = any(a is not None for a in (*args[1:], *kwargs.values()))
        for parameter, zeros in self._masked():
            zeros.clear_(parameter)
            state = [
                value
                for value in optimizer.state.get(parameter, {}).values()
                if isinstance(value, Tensor) and value.shape == parameter.shape
            ]
            # Once zero, momentum stays exactly zero under zero gradients and zero weights.
            seen = [zeros, *state]
            if closure or not _same(self._cleared.get(id(parameter)), seen):
                for value in state:
                    zeros.clear_(value)
                self._cleared[id(parameter)] = seen


def _same(before: list[object] | None, now: list[object]) -> bool:
    if before is None or len(before) != len(now):
        return False
    return all(a is b for a, b in zip(before, now, strict=True))


def keep_masks(model: nn.Module, optimizer: torch.optim.Optimizer) -> MaskKeeper:
    """Keep every masked weight exactly zero under this optimizer, and return a handle.

    Before each step the gradients of masked entries are set to 0; after it, the entries themselves
    and the optimizer's state for them (momentum, averages) are. Works with weight decay, autocast,
    GradScaler, foreach and fused steps; masks that a later `prune_` tightens are followed.
    Gradient clipping comes before the step and still sees the gradients of masked entries.

    An averaged copy (torch.optim.swa_utils.AveragedModel) made after pruning keeps its zeros by
    itself; for one made before, call `lw.prune.copy_masks_(model, averaged)` once after pruning.

    Raises ValueError where the model is masked but the optimizer holds none of the masked
    parameters (an optimizer of another model, or made before they were replaced).
    """
    if not isinstance(model, nn.Module) or not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"keep_masks needs a module and an optimizer, got {type(model).__name__} "
            f"and {type(optimizer).__name__}"
        )
    masked = [p for m in model.modules() for _, p, _ in module_masks(m)]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if masked and not any(id(p) in held for p in masked):
        raise ValueError("keep_masks: the optimizer holds none of the model's masked parameters")
    return MaskKeeper(model, optimizer)
