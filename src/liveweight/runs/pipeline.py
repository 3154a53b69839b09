"""What is done to a batch on its way into training: random crops and flips, and the precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PAD = 4  # black pixels put around an image before it is cropped to its size again


@dataclass(frozen=True)
class Moves:
    """Where each sample of an epoch is cropped, and which are mirrored.

    shift  int64 [N, 2]: first row and column of the crop, from -PAD to PAD
    flip   bool [N]
    """

    shift: Tensor
    flip: Tensor

    def part(self, start: int, stop: int) -> Moves:
        return Moves(self.shift[start:stop], self.flip[start:stop])


@dataclass(frozen=True)
class Augment:
    """Random crops after padding by 4 pixels, and horizontal flips, for a whole batch at once.

    names  any of "crop", "flip"
    black  value of a black pixel per channel, after normalisation; empty: 0
    """

    names: tuple[str, ...]
    black: tuple[float, ...] = ()

    @classmethod
    def make(
        cls, names: Sequence[str], mean: Sequence[float], std: Sequence[float]
    ) -> Augment | None:
        """Return the augmentation of inputs normalised by mean and std; None without names."""
        black = tuple(-m / s for m, s in zip(mean, std, strict=True))
        return cls(tuple(names), black) if names else None

    def draw(self, count: int, generator: torch.Generator, device: torch.device) -> Moves:
        """Draw the moves of an epoch on the CPU, so that they are the same for every device."""
        shift = torch.zeros(count, 2, dtype=torch.int64)
        flip = torch.zeros(count, dtype=torch.bool)
        if "crop" in self.names:
            shift = torch.randint(-PAD, PAD + 1, (count, 2), generator=generator)
        if "flip" in self.names:
            flip = torch.randint(0, 2, (count,), generator=generator).bool()
        return Moves(shift.to(device), flip.to(device))

    def apply(self, x: Tensor, moves: Moves) -> Tensor:
        """Return the moved images: y[n, c, i, j] = x[n, c, i + dy_n, j' + dx_n], black outside.

        x [N, C, H, W] float; j' = W - 1 - j where sample n is mirrored, else j. One gather.
        ValueError: x has no height and width, or other channels than black has values.
        """
        if x.dim() != 4:
            raise ValueError(
                f"augment: images must be [N, channels, height, width], got {tuple(x.shape)}"
            )
        count, channels, height, width = x.shape
        if self.black and len(self.black) != channels:
            raise ValueError(
                f"augment: black has {len(self.black)} values, images {channels} channels"
            )
        rows = torch.arange(height, device=x.device) + moves.shift[:, :1]
        columns = torch.arange(width, device=x.device).expand(count, width)
        columns = torch.where(moves.flip[:, None], width - 1 - columns, columns)
        columns = columns + moves.shift[:, 1:]
        inside = _within(rows, height)[:, :, None] & _within(columns, width)[:, None, :]
        rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
        places = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)[:, None]
        moved = x.flatten(2).gather(2, places.expand(-1, channels, -1)).view_as(x)
        black = x.new_tensor(self.black or [0.0]).view(1, -1, 1, 1)
        return torch.where(inside[:, None], moved, black)


def _within(places: Tensor, size: int) -> Tensor:
    return (places >= 0) & (places < size)


def autocast_type(precision: str, device: torch.device) -> torch.dtype | None:
    """Return what convolutions and matrix products are computed in; None: float32.

    precision   "fp32", "bf16", or "auto": bfloat16 where the device multiplies it in hardware
                (GPUs of compute capability 8.0 on, CPUs with AMX), float32 elsewhere
    """
    if precision == "auto":
        precision = "bf16" if _has_bf16_units(device) else "fp32"
    return {"fp32": None, "bf16": torch.bfloat16}[precision]


def _has_bf16_units(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return device.type == "cpu" and torch.cpu.get_capabilities().get("amx_bf16", False)
