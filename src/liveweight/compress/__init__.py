"""From a pruned model to a faster and smaller one: shrink, choose by measurement, save and load."""

from __future__ import annotations

from liveweight.compress.benchmark import BenchmarkResult, BenchmarkRow, benchmark
from liveweight.compress.checkpoint import load, save
from liveweight.compress.choose import compress_
from liveweight.compress.report import ChoiceRow, CompressReport, ShrinkReport, ShrinkRow
from liveweight.compress.shrink import shrink_

__all__ = [
    "BenchmarkResult",
    "BenchmarkRow",
    "ChoiceRow",
    "CompressReport",
    "ShrinkReport",
    "ShrinkRow",
    "benchmark",
    "compress_",
    "load",
    "save",
    "shrink_",
]
