"""One choice out of the verdicts at several batch sizes: one candidate, or some by batch size."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

from torch import nn

from liveweight.compress import packing
from liveweight.compress.batches import thresholds
from liveweight.compress.candidates import Candidate, Plan, build
from liveweight.compress.chains import Chain
from liveweight.compress.decide import Verdict
from liveweight.compress.forms import BY_BATCH
from liveweight.nn import ByBatch

# One format for all sizes is taken if it reaches this share of what choosing by size would gain.
NEARLY = 0.95


@dataclass
class Choice:
    """candidate: None where the layer stays dense; saved_us: summed over the batch sizes."""

    candidate: Candidate | None
    speedup: float = 1.0
    reason: str = ""
    saved_us: float = 0.0
    by_batch: dict[int, str] = field(default_factory=dict)


def combine(
    chain: Chain, verdicts: dict[int, Verdict], candidates: list[Candidate], own_batch: int
) -> Choice:
    """Return what is the best over all batch sizes and at none slower than dense."""
    if len(verdicts) == 1:
        (verdict,) = verdicts.values()
        winner = next((c for c in candidates if c.label == verdict.winner), None)
        saved = _saved(verdict, verdict.winner) if winner else 0.0
        return Choice(winner, verdict.speedup, verdict.reason, saved)
    single, single_gain = _best_single(verdicts, candidates)
    group, labels, gain = _best_group(verdicts, candidates)
    if gain <= 1.0 and single is None:
        reasons = [f"batch {size}: {v.reason}" for size, v in verdicts.items()]
        return Choice(None, 1.0, "; ".join(reasons))
    if single is not None and single_gain >= NEARLY * gain:
        labels, gain, candidate = dict.fromkeys(verdicts, single.label), single_gain, single
    else:
        candidate = _dispatching(chain, labels, group, own_batch)
    ratios = [f"{labels[s]} {_gain(v, labels[s]):.2f}x at batch {s}" for s, v in verdicts.items()]
    saved = sum(_saved(v, labels[s]) for s, v in verdicts.items())
    return Choice(candidate, gain, ", ".join(ratios), saved, dict(labels))


def _gain(verdict: Verdict, label: str) -> float:
    return verdict.speedups.get(label, 1.0)


def _saved(verdict: Verdict, label: str) -> float:
    return verdict.times_us["dense"] - verdict.times_us.get(label, verdict.times_us["dense"])


def _mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _best_single(
    verdicts: dict[int, Verdict], candidates: list[Candidate]
) -> tuple[Candidate | None, float]:
    """Return the candidate that may be taken at every size and gains most, and its gain."""
    best, best_gain = None, 1.0
    for candidate in candidates:
        if all(candidate.label in v.speedups for v in verdicts.values()):
            gain = _mean([v.speedups[candidate.label] for v in verdicts.values()])
            if gain > best_gain:
                best, best_gain = candidate, gain
    return best, best_gain


def _best_group(
    verdicts: dict[int, Verdict], candidates: list[Candidate]
) -> tuple[list[Candidate], dict[int, str], float]:
    """Return candidates that take in the same modules, the label per size, and the gain.

    Where none of them may be taken at a size, "dense" stands there.
    """
    best: tuple[list[Candidate], dict[int, str], float] = ([], {}, 1.0)
    for absorbed in dict.fromkeys(c.absorbed for c in candidates):
        group = [c for c in candidates if c.absorbed == absorbed]
        if any(getattr(c.module, "pool", 1) > 1 for c in group):
            continue  # a dense layer takes in no pool
        names = {c.label for c in group}
        labels = {}
        for size, verdict in verdicts.items():
            able = {n: s for n, s in verdict.speedups.items() if n in names}
            labels[size] = max(able, key=able.get) if able else "dense"
        gain = _mean([_gain(v, labels[s]) for s, v in verdicts.items()])
        if gain > best[2]:
            best = (group, labels, gain)
    return best


def _dispatching(
    chain: Chain, labels: dict[int, str], group: list[Candidate], own_batch: int
) -> Candidate:
    """Return a candidate that hands each batch size to the form that is the fastest there."""
    modules = {c.label: c.module for c in group}
    absorbed = group[0].absorbed
    if "dense" in labels.values():
        modules["dense"] = _plain(chain, len(absorbed))
    per_sample = chain.x.shape[0] // own_batch
    choices, limits = [], []
    limit_of = dict(zip(labels, thresholds(labels), strict=False))
    for label, sizes in itertools.groupby(labels, key=labels.get):
        choices.append(modules[label])
        limits.append(limit_of.get(list(sizes)[-1], 0.0) * per_sample)
    sample_dim = 1 if isinstance(chain.layer, nn.Linear) else 3
    parts = (chain.name, *absorbed) if absorbed else ()
    module = ByBatch(choices, limits[:-1], sample_dim=sample_dim, parts=parts)
    module.train(chain.layer.training)
    return Candidate(BY_BATCH, BY_BATCH, module, absorbed, group[0].rest)


def _plain(chain: Chain, joined: int) -> nn.Module:
    """Return the dense layer as it is, with what the others take in joined."""
    (candidate,), _ = build(chain, [Plan(packing.JOINED, joined).named(chain.kinds)])
    return candidate.module
