"""Times predicted from counts and from a short calibration of this machine.

time = call overhead + max(flops / speed, weight bytes / bandwidth) + passes over the output

The speed of a format is read off its calibrated points: a mean of their logarithms, weighted by
the inverse square of the distance in batch, plane and density, all on logarithmic scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from liveweight.compress.work import Work, work_of

# A candidate predicted to take this many times as long as the best one is not built.
HOPELESS_BEYOND = 1.5
_BYTES_PER_WEIGHT = {"dense": 4.0, "kernelwise": 4.5, "block": 4.1}


@dataclass
class Speed:
    """One format on one kind of layer: call overhead in us, and (features, GFLOP/s) points."""

    overhead_us: float
    points: list[tuple[tuple[float, ...], float]] = field(default_factory=list)

    def at(self, features: tuple[float, ...]) -> float:
        """Return GFLOP/s at some features."""
        total, weight_sum = 0.0, 0.0
        for place, speed in self.points:
            distance = sum((a - b) ** 2 for a, b in zip(place, features, strict=True))
            weight = 1.0 / (distance + 0.05)
            total += weight * math.log(speed)
            weight_sum += weight
        return math.exp(total / weight_sum)


class CostModel:
    """Predicts microseconds; calibrates a format on a kind of layer when it is first asked.

    calibrate(name, kind)  returns the Speed of a format
    bandwidth()            returns bytes per microsecond of a pass that reads and writes a tensor
    """

    def __init__(
        self, calibrate: Callable[[str, str], Speed], bandwidth: Callable[[], float]
    ) -> None:
        self._calibrate = calibrate
        self._measure_bandwidth = bandwidth
        self.speeds: dict[tuple[str, str], Speed] = {}
        self._bandwidth: float | None = None

    @property
    def bandwidth(self) -> float:
        """Bytes per microsecond of one elementwise pass, read and written bytes together."""
        if self._bandwidth is None:
            self._bandwidth = self._measure_bandwidth()
        return self._bandwidth

    def predict(self, layer: nn.Module, name: str, x: Tensor, passes: int = 0) -> float:
        """Return the microseconds of a layer in a format, and of passes over its output behind it.

        name is a format, "dense" for the layer as it is, or the name of packed dense layers.
        """
        work = work_of(layer, name, x)
        speed = self._speed(name, work.kind)
        moved = work.stored * _BYTES_PER_WEIGHT.get(name.split(",")[0], 6.0)
        busy = max(work.flops / 1e3 / speed.at(work.features), moved / (2.0 * self.bandwidth))
        return speed.overhead_us + busy + passes * 2.0 * work.out_bytes / self.bandwidth

    def learn(self, layer: nn.Module, name: str, x: Tensor, microseconds: float) -> None:
        """Take a measured time as one more point."""
        work = work_of(layer, name, x)
        if work.flops:
            speed = self._speed(name, work.kind)
            speed.points.append((work.features, speed_of(work, microseconds, speed.overhead_us)))

    def _speed(self, name: str, kind: str) -> Speed:
        if (name, kind) not in self.speeds:
            self.speeds[name, kind] = self._calibrate(name, kind)
        return self.speeds[name, kind]


def speed_of(work: Work, microseconds: float, overhead_us: float) -> float:
    """Return GFLOP/s of a call, its overhead left out as far as it can be told."""
    return work.flops / 1e3 / max(microseconds - overhead_us, 0.2 * microseconds, 1e-3)
