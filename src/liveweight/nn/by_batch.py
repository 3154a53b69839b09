"""ByBatch: one layer in several forms, each for the batch sizes at which it is the fastest."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class ByBatch(nn.Module):
    """Hands x to choices[i] for limits[i - 1] < x.shape[0] <= limits[i], the last one above all.

    x        what every choice takes; without a batch dimension (see sample_dim) it counts as one
    returns  what the choice returns

    choices     modules that compute the same function of x; equal forms are one module
    limits      rising, one fewer than choices
    sample_dim  dimensions of one sample: 1 for Linear, 3 for Conv2d
    parts       names of the modules that this one stands for, where several were joined

    Attributes of the layer, such as weight or in_features, are those of the first choice. All
    choices hold the same numbers and need no gradients: train before, or one of them would change.
    Raises ValueError where limits do not fit.
    """

    def __init__(
        self,
        choices: Sequence[nn.Module],
        limits: Sequence[float],
        *,
        sample_dim: int,
        parts: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        if len(limits) != len(choices) - 1 or list(limits) != sorted(limits):
            raise ValueError(
                f"ByBatch: {len(choices)} choices need {len(choices) - 1} rising limits, "
                f"got {list(limits)}"
            )
        self.choices = nn.ModuleList(choices).requires_grad_(False)
        self.limits = tuple(float(limit) for limit in limits)
        self.sample_dim = sample_dim
        self.parts = tuple(parts)

    def forward(self, x: Tensor) -> Tensor:
        """Return choices[i](x) for the batch size of x."""
        rows = x.shape[0] if x.dim() > self.sample_dim else 1
        choices = self.choices._modules
        for index, limit in enumerate(self.limits):
            if rows <= limit:
                return choices[str(index)](x)
        return choices[str(len(self.limits))](x)

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            choices = self.__dict__.get("_modules", {}).get("choices")
            if choices is None or name.startswith("_"):
                raise
            return getattr(choices[0], name)

    def extra_repr(self) -> str:
        """The batch sizes of the choices."""
        lows = [0.0, *self.limits]
        ranges = [f"{i}: batch > {low:g}" if low else f"{i}: smaller" for i, low in enumerate(lows)]
        return "; ".join(ranges)
