"""What compress_ may put in a layer's place: formats, alone or joined with what follows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from liveweight._check import near_misses
from liveweight._library import backends
from liveweight.compress import chains, packing, swap
from liveweight.compress.chains import Chain
from liveweight.compress.inputs import difference


@dataclass(frozen=True)
class Plan:
    """A candidate before it is built: its format and how much of the chain's tail it takes in.

    kinds  of the modules it takes in: "norm", an activation's name, "pool"
    """

    format: str
    joined: int
    kinds: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The name in reports, such as "kernelwise+norm+relu"."""
        return "+".join((self.format, *self.kinds))

    @property
    def activation(self) -> str | None:
        """Name of the activation it takes in, None where it takes none."""
        return next((kind for kind in self.kinds if kind not in ("norm", "pool")), None)

    def named(self, kinds: list[str]) -> Plan:
        """Return the plan with the kinds of the tail it takes in."""
        return Plan(self.format, self.joined, tuple(kinds[: self.joined]))

    def shortened(self, joined: int) -> Plan:
        """Return the plan that takes in only the first so many modules."""
        return Plan(self.format, joined, self.kinds[:joined])


@dataclass
class Candidate:
    """A module that takes a layer's place, and the modules it makes superfluous."""

    label: str
    format: str
    module: nn.Module
    absorbed: tuple[str, ...]
    rest: list[nn.Module]

    def call(self, x: Tensor) -> Callable[[], Tensor]:
        """Return the candidate and what it leaves of the chain as one call."""
        return chains.in_turn([self.module, *self.rest], x)


def check_formats(formats: str | Iterable[str]) -> tuple[str, ...]:
    """Return the names of formats to try, "dense" for packed dense layers among them.

    Raises ValueError for unknown names or none at all.
    """
    if formats == "auto":  # n:m runs the kernel of single weights: no candidate of its own
        return ("dense", *(name for name in swap.format_names() if name != "nm"))
    if isinstance(formats, str):
        formats = [formats]
    if not isinstance(formats, (list, tuple, set, frozenset)):
        got = type(formats).__name__
        raise TypeError(f'compress_: formats must be "auto" or a list of names, got {got}')
    known = ["dense", *swap.format_names()]
    for name in formats:
        if name not in known:
            hint = near_misses(str(name), known)
            raise ValueError(f"compress_: formats has an unknown name {name!r}; {hint}")
    if not formats:
        raise ValueError(f'compress_: formats is empty; expected "auto" or some of {known}')
    return tuple(formats)


def formats_for(layer: nn.Module, formats: tuple[str, ...], device: torch.device) -> list[str]:
    """Return the formats that serve this kind of layer on this device.

    Raises ValueError with the reason where there is none. On a GPU a format counts only if its op
    has a kernel of its own there; on a CPU the plain PyTorch version is measured like any other.
    """
    ops = swap.formats_of(type(layer))
    fitting = [name for name in formats if name in ops]
    if not fitting:
        if "dense" in formats:
            return []
        raise ValueError(f"formats names none for a {type(layer).__name__}")
    table = backends()
    if device.type != "cuda":
        # What is laid out for GPUs: tried on a CPU only where nothing else is named.
        others = [n for n in fitting if n not in swap.GPU_LAYOUTS and ops[n] != "block_conv2d"]
        return others or fitting
    served = [n for n in fitting if table[ops[n]]["cuda"] != "reference"]
    if not served:
        raise ValueError(f"no CUDA kernel for {ops[fitting[0]]}")
    reasons = {name: swap.why_not(name, layer) for name in served}
    fitting = [name for name, why in reasons.items() if not why]
    if not fitting:
        raise ValueError("; ".join(reasons.values()))
    return fitting


def plans(chain: Chain, formats: list[str], packing_fits: bool, joins: bool) -> list[Plan]:
    """Return what may be built for a chain: every format joined with what it can take in.

    packing_fits  a dense layer packed for oneDNN is among them; joins: so is a dense one as it is
                  where it can take in a norm

    A norm and an activation always join where they can, for both cost a pass of their own
    otherwise; a pool is tried inside and outside.
    """
    kinds = chain.kinds
    before_pool = len(kinds) - (kinds[-1:] == ["pool"])
    found = [Plan(name, joined) for name in formats for joined in {before_pool, len(kinds)}]
    found.sort(key=lambda plan: (formats.index(plan.format), plan.joined))
    if packing_fits:
        found.append(Plan(packing.LABEL, before_pool))
    if joins and "norm" in kinds:
        found.append(Plan(packing.JOINED, before_pool))
    return [plan.named(kinds) for plan in found]


def build(chain: Chain, wanted: list[Plan]) -> tuple[list[Candidate], list[str]]:
    """Return every candidate that works and agrees with dense, and why others do not.

    Where a format refuses what it was to take in, it is tried with less.
    """
    built: dict[str, Candidate] = {}
    refused: dict[str, None] = {}
    expected = _evaluate(chain.dense())
    for plan in wanted:
        for joined in range(plan.joined, -1, -1):
            shorter = plan.shortened(joined)
            if shorter.label in built:
                break
            try:
                candidate = _candidate(chain, shorter)
                words = difference(expected, _evaluate(candidate.call(chain.x)))
            except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
                refused[f"{plan.format}: {error}"] = None
                continue
            if words:
                refused[f"{candidate.label} disagrees with dense: {words}"] = None
                continue
            built[candidate.label] = candidate
            break
    return list(built.values()), list(refused)


def _evaluate(call: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad():
        return call().clone()


def _candidate(chain: Chain, plan: Plan) -> Candidate:
    inside, rest = chain.tail[: plan.joined], [m for _, m in chain.tail[plan.joined :]]
    absorbed = tuple(part for part, _ in inside)
    parts = (chain.name, *absorbed) if absorbed else ()
    layer, pool = chain.layer, 1
    for (_, module), kind in zip(inside, plan.kinds, strict=False):
        if kind == "norm":
            layer = chain.folded(module)
        elif kind == "pool":
            pool = chains.pool_size(module)
    options = {"activation": plan.activation, "parts": parts}
    if plan.format in (packing.LABEL, packing.JOINED):
        module = packing.make_packed(layer, plan.format, **options)
    else:
        if plan.format == "block" and isinstance(layer, nn.Linear) and chain.x.is_cuda:
            options["block"] = swap.gpu_block(layer, chain.x.shape[:-1].numel())
        if plan.format == "delta":
            options["samples"] = chain.x.shape[:-1].numel()
        module = swap.make_sparse(layer, plan.format, pool=pool, **options)
    module.train(chain.layer.training)
    return Candidate(plan.label, plan.format, module, absorbed, rest)
