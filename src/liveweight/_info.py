"""What this installation can do here: versions, CPU, GPU, and who serves which op where."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field

import torch

from liveweight import _library


@dataclass(frozen=True)
class Info:
    """Facts about the installation; prints as a table."""

    versions: dict[str, str]
    cpu: dict[str, str]
    gpus: list[str]
    parts: dict[str, str]
    backends: dict[str, dict[str, str]] = field(repr=False)

    def __str__(self) -> str:
        rows = [("versions", ", ".join(f"{k} {v}" for k, v in self.versions.items()))]
        rows += [(key, value) for key, value in self.cpu.items()]
        rows += [("GPU", gpu) for gpu in self.gpus] or [("GPU", "none that torch can use")]
        rows += [(f"part: {key}", value) for key, value in self.parts.items()]
        lines = [f"{key:<16}{value}" for key, value in rows]
        width = max(map(len, self.backends))
        lines += ["", f"{'op':<{width}}  {'cpu':<16}cuda"]
        lines += [f"{op:<{width}}  {d['cpu']:<16}{d['cuda']}" for op, d in self.backends.items()]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return str(self)


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    return [
        f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB"
        for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]


def info() -> Info:
    """Return versions, CPU features, GPUs, and op x device -> backend with reasons for gaps.

    backends maps each op to {"cpu": ..., "cuda": ...}, one of "c++ (<isa>)", "cuda c++", "triton"
    and "reference" (plain PyTorch: right, but slow).
    """
    import liveweight

    versions = {
        "liveweight": liveweight.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    cpu = {
        "CPU": f"{_cpu_model()}, {os.cpu_count()} logical cores",
        "CPU kernels": f"{_library.cpu_isa()}, {torch.get_num_threads()} threads",
    }
    return Info(versions, cpu, _gpus(), _library.status(), _library.backends())
