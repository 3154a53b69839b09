"""From a pruned model to a faster and smaller one: shrink, choose by measurement, save and load."""

from __future__ import annotations

from liveweight.compress.benchmark import BenchmarkResult, BenchmarkRow, benchmark
from liveweight.compress.report import ShrinkReport, ShrinkRow
from liveweight.compress.shrink import shrink_

__all__ = [
    "BenchmarkResult",
    "BenchmarkRow",
    "ShrinkReport",
    "ShrinkRow",
    "benchmark",
    "shrink_",
]
