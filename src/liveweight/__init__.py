"""liveweight: keep the weights that carry activity, and run what is left measurably faster.

report = lw.prune_(model, data, alpha=0.95)      # score by activity, attach masks
keep = lw.keep_masks(model, optimizer)           # retrain: zeros stay exact
lw.strip_(model)                                 # zeros become permanent
lw.shrink_(model, example_inputs)                # dead neurons and channels go
print(lw.compress_(model, example_inputs))       # faster modules, where they measure faster
lw.save(model, "net.safetensors")
"""

from __future__ import annotations

__version__ = "0.1.0"

from liveweight import compress, formats, nn, ops, prune
from liveweight._info import Info, info
from liveweight.compress import benchmark, compress_, load, save, shrink_
from liveweight.prune import (
    apply_masks_,
    keep_masks,
    masks,
    prune_,
    recalibrate_bn_,
    rewind_,
    score,
    strip_,
)
from liveweight.runs.target.prune_to import prune_to_

__all__ = [
    "Info",
    "apply_masks_",
    "benchmark",
    "compress",
    "compress_",
    "formats",
    "info",
    "keep_masks",
    "load",
    "masks",
    "nn",
    "ops",
    "prune",
    "prune_",
    "prune_to_",
    "recalibrate_bn_",
    "rewind_",
    "save",
    "score",
    "shrink_",
    "strip_",
]
