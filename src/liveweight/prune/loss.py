"""The loss on labelled batches and its derivatives by the weights of some layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from liveweight.prune.batches import call, evaluating, model_devices
from liveweight.prune.importances import Target

Loss = Callable[[Tensor, Tensor], Tensor]
# Bytes of per-sample derivatives that may be held at a time.
CHUNK_BYTES = 256 << 20


def cross_entropy(output: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy, what the importances take where no loss is named."""
    return F.cross_entropy(output, labels)


class LabelledData:
    """A model's loss on batches (input, labels), in eval mode; weights are those of some targets.

    loss(output, labels) returns the mean over the batch's samples.
    owner   named in errors

    Raises ValueError for batches without labels, a loss that is not finite, no sample at all, and
    under torch.inference_mode, whose tensors have no gradients.
    """

    def __init__(
        self, owner: str, model: nn.Module, targets: Mapping[str, Target], loss: Loss | None
    ) -> None:
        if torch.is_inference_mode_enabled():
            raise ValueError(
                f"importance '{owner}' needs gradients, which torch.inference_mode rules out: "
                "call it outside"
            )
        self.owner = owner
        self.model = model
        self.loss = cross_entropy if loss is None else loss
        self.weights = {}
        for name, target in targets.items():
            weight = target.module._parameters.get("weight")
            if weight is None:
                raise ValueError(
                    f"importance '{owner}': the weight of layer '{name}' is no parameter (a mask "
                    "or a parametrization computes it); make it permanent first"
                )
            self.weights[name] = weight
        self.samples = 0

    def batches(self, data: Iterable) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (input, labels), in eval mode; counts the samples."""
        devices = model_devices(self.model)
        with evaluating(self.model):
            for batch in data:
                yield self._pair(batch, devices)
        if self.samples == 0:
            raise ValueError(f"importance '{self.owner}': data is empty")

    def _pair(self, batch: object, devices: set[torch.device]) -> tuple[Tensor, Tensor]:
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            raise ValueError(
                f"importance '{self.owner}' needs labels: batches (input, labels), got a "
                f"{type(batch).__name__}"
            )
        x, labels = batch[:2]
        if not (isinstance(x, Tensor) and isinstance(labels, Tensor)):
            got = f"{type(x).__name__}, {type(labels).__name__}"
            raise ValueError(f"importance '{self.owner}' needs tensors (input, labels), got {got}")
        if len(x) != len(labels):
            raise ValueError(
                f"importance '{self.owner}': {len(x)} samples but {len(labels)} labels in a batch"
            )
        off = {t.device for t in (x, labels)} - devices
        if devices and off:
            raise ValueError(f"data is on {off.pop()}, the model on {sorted(map(str, devices))}")
        self.samples += len(x)
        return x, labels

    def checked(self, loss: Tensor) -> Tensor:
        """Return the loss; raise ValueError where it is not one finite number."""
        if loss.numel() != 1:
            raise ValueError(
                f"importance '{self.owner}': the loss must be one number, the mean over the batch; "
                f"got shape {list(loss.shape)}"
            )
        if not bool(torch.isfinite(loss)):
            raise ValueError(f"importance '{self.owner}': the loss is {float(loss.detach())}")
        return loss

    def check_losses(self, losses: Tensor) -> None:
        """Raise ValueError where one of the samples' losses is not finite."""
        losses = losses.detach()
        bad = losses[~torch.isfinite(losses)]
        if len(bad):
            raise ValueError(f"importance '{self.owner}': the loss of a sample is {float(bad[0])}")

    def gradients(self, data: Iterable) -> Iterator[tuple[dict[str, Tensor], int]]:
        """Yield, batch by batch, the gradients of the mean loss and the number of samples."""
        weights = list(self.weights.values())
        wanted = [w.requires_grad for w in weights]
        try:
            for w in weights:
                w.requires_grad_(True)
            for x, labels in self.batches(data):
                with torch.enable_grad():
                    output, _ = call(self.model, x, set())
                    loss = self.checked(self.loss(output, labels))
                    found = torch.autograd.grad(loss, weights, allow_unused=True)
                pairs = zip(weights, found, strict=True)
                found = [torch.zeros_like(w) if g is None else g for w, g in pairs]
                yield dict(zip(self.weights, found, strict=True)), len(x)
        finally:
            for w, value in zip(weights, wanted, strict=True):
                w.requires_grad_(value)

    def function(self) -> Callable[[dict[str, Tensor], Tensor, Tensor], Tensor]:
        """Return f(weights by layer name, one input, its label) -> its loss, for torch.func."""

        def run(weights: dict[str, Tensor], x: Tensor, label: Tensor) -> Tensor:
            return self.loss(self.outputs(weights, x), label.unsqueeze(0))

        return run

    def outputs(self, weights: dict[str, Tensor], x: Tensor) -> Tensor:
        """Return the model's output [1, ...] for one input without its batch dimension."""
        named = {f"{n}.weight" if n else "weight": w for n, w in weights.items()}
        return functional_call(self.model, named, (x.unsqueeze(0),))

    def detached(self) -> dict[str, Tensor]:
        """Return the weights by layer name, without gradients."""
        return {name: w.detach() for name, w in self.weights.items()}

    def per_sample(self, data: Iterable) -> Iterator[dict[str, Tensor]]:
        """Yield per-sample gradients by layer name, [samples, *weight], a chunk at a time."""
        weights = self.detached()
        derive = grad_and_value(self.function())
        derive = vmap(derive, in_dims=(None, 0, 0), randomness="different")
        size = sum(w.numel() * w.element_size() for w in weights.values())
        at_once = max(1, CHUNK_BYTES // max(1, size))
        for x, labels in self.batches(data):
            for part, tags in zip(x.split(at_once), labels.split(at_once), strict=True):
                found, losses = derive(weights, part, tags)
                self.check_losses(losses)
                for name, g in found.items():
                    if not bool(torch.isfinite(g).all()):
                        raise ValueError(
                            f"importance '{self.owner}': the loss or its gradient by layer "
                            f"'{name}' is not finite"
                        )
                yield {name: g.detach() for name, g in found.items()}
