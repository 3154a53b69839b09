"""Small networks of the shapes that shrinking and compressing meet; how to make them sparse."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from liveweight.compress.measure import Timings


class LeNet(nn.Module):
    """Convolutions, ReLU and pooling as modules, a flatten, two Linears; 1x16x16 -> 10."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(2 * width * 4, 32), nn.ReLU(), nn.Linear(32, 10)
        )

    def forward(self, x):
        return self.classifier(self.features(x))


class NormNet(nn.Module):
    """Convolution, BatchNorm, ReLU, pool, flatten, Linear; 3x8x8 -> 5; padding as asked."""

    def __init__(self, padding: int = 0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=padding, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, padding=padding)
        self.bn2 = nn.BatchNorm2d(12)
        self.pool = nn.MaxPool2d(2)
        side = (8 if padding else 4) // 2
        self.head = nn.Linear(12 * side * side, 5)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.pool(F.relu(self.bn2(self.conv2(x))))
        return self.head(torch.flatten(x, 1))


class FunctionalNet(nn.Module):
    """Everything between the layers is called as a function; 12 -> 4."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(12, 16)
        self.fc2 = nn.Linear(16, 8, bias=bias)
        self.fc3 = nn.Linear(8, 4, bias=bias)

    def forward(self, x):
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


class ResidualNet(nn.Module):
    """A residual add in the middle; 4x6x6 -> 3."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 6, 3, padding=1)
        self.conv1 = nn.Conv2d(6, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = x + self.conv2(F.relu(self.conv1(x)))
        return self.head(x.mean((2, 3)))


class BranchingNet(nn.Module):
    """Control flow that depends on the data: cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.fc2 = nn.Linear(8, 2)

    def forward(self, x):
        x = self.fc1(x)
        if x.sum() > 0:
            x = F.relu(x)
        return self.fc2(x)


def settle(model: nn.Module) -> nn.Module:
    """Give biases and BatchNorm random values, so that nothing is right by being zero or one."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
        elif isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
            nn.init.normal_(module.bias)
    return model.eval()


def sparsify(model: nn.Module, density: float = 0.2, masks: bool = True) -> nn.Module:
    """Zero random weights of every Linear and Conv2d; attach the masks as buffers."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            mask = torch.rand_like(module.weight) < density
            with torch.no_grad():
                module.weight.masked_fill_(~mask, 0.0)
            if masks:
                module.register_buffer("weight_mask", mask)
    return model


def size(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


class Clock:
    """A measure function by label: microseconds per candidate, dense at 10; notes what it saw.

    Times by label, with _ for + and "packed" for a packed dense layer; "unstructured" means that of
    a Linear, "conv_unstructured" that of a convolution. What is not named takes 20.
    """

    def __init__(self, whole: float | list[float] = 5.0, **times: float) -> None:
        self.times = times
        self.whole = list(whole) if isinstance(whole, list) else [whole]
        self.races: list[list[str]] = []

    def __call__(self, calls, *, prepare=None, **options):
        for name, call in calls.items():
            if prepare:
                prepare[name]()
            call()
        if "compressed" in calls:
            time = self.whole.pop(0) if len(self.whole) > 1 else self.whole[0]
            return Timings({"dense": [10.0] * 8, "compressed": [time] * 8})
        if "layouts as they come" in calls:
            return Timings({name: [10.0] * 8 for name in calls})
        self.races.append(list(calls))
        conv = any(name.startswith("kernelwise") for name in calls)
        return Timings({name: [self._time(name, conv)] * 8 for name in calls})

    def _time(self, label: str, conv: bool) -> float:
        if label == "dense":
            return 10.0
        key = label.replace("dense, ", "").replace("+", "_")
        if conv and key.startswith("unstructured"):
            key = f"conv_{key}"
        return self.times.get(key, 20.0)

    def tried(self, index: int, name: str) -> list[str]:
        """Labels of one race that belong to a format."""
        return [label for label in self.races[index] if label.split("+")[0] == name]


ALL_FASTER = {
    "kernelwise": 6.0,
    "kernelwise_relu": 5.0,
    "kernelwise_relu_pool": 4.0,
    "unstructured": 5.0,
    "unstructured_relu": 4.0,
}
