"""What compress_ may put in a layer's place: formats, alone or joined with what follows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from liveweight._check import near_misses
from liveweight._library import backends
from liveweight.compress import chains, swap
from liveweight.compress.chains import Chain
from liveweight.compress.inputs import difference


@dataclass
class Candidate:
    """A sparse module that takes a layer's place, and the modules it makes superfluous."""

    label: str
    format: str
    module: nn.Module
    absorbed: tuple[str, ...]
    call: Callable[[], Tensor]


def check_formats(formats: str | Iterable[str]) -> tuple[str, ...]:
    """Return the names of formats to try. Raises ValueError for unknown names or none at all."""
    if formats == "auto":
        return swap.format_names()
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
    return tuple(name for name in formats if name != "dense")


def formats_for(layer: nn.Module, formats: tuple[str, ...], device: torch.device) -> list[str]:
    """Return the formats that serve this kind of layer on this device.

    Raises ValueError with the reason where there is none. On a GPU a format counts only if its op
    has a kernel of its own there; on a CPU the plain PyTorch version is measured like any other.
    """
    ops = swap.formats_of(type(layer))
    fitting = [name for name in formats if name in ops]
    if not fitting:
        raise ValueError(f"formats names none for a {type(layer).__name__}")
    if device.type != "cuda":
        return fitting
    table = backends()
    served = [n for n in fitting if table[ops[n]]["cuda"] != "reference"]
    if not served:
        raise ValueError(f"no CUDA kernel for {ops[fitting[0]]}")
    return served


def build(chain: Chain, formats: list[str]) -> tuple[list[Candidate], list[str]]:
    """Return every candidate that works and agrees with dense, and why others do not.

    Each format is tried alone and joined with one or two modules of the chain's tail.
    """
    built, refused = [], []
    expected = _evaluate(chain.dense())
    for name in formats:
        for joined in range(len(chain.tail) + 1):
            try:
                candidate = _candidate(chain, name, joined)
                words = difference(expected, _evaluate(candidate.call))
            except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
                refused.append(f"{name}: {error}")
                break
            if words:
                refused.append(f"{candidate.label} disagrees with dense: {words}")
            else:
                built.append(candidate)
    return built, refused


def _evaluate(call: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad():
        return call().clone()


def _candidate(chain: Chain, name: str, joined: int) -> Candidate:
    inside, rest = chain.tail[:joined], [module for _, module in chain.tail[joined:]]
    pools = [size for _, m in inside if (size := chains.pool_size(m)) is not None]
    pool = pools[0] if pools else 1
    activation = "relu" if any(type(m) is nn.ReLU for _, m in inside) else None
    absorbed = tuple(part for part, _ in inside)
    module = swap.make_sparse(
        chain.layer,
        name,
        activation=activation,
        pool=pool,
        parts=(chain.name, *absorbed) if absorbed else (),
    )
    module.train(chain.layer.training)
    label = "+".join([name, *(["relu"] if activation else []), *(["pool"] if pools else [])])
    return Candidate(label, name, module, absorbed, chains.in_turn([module, *rest], chain.x))
