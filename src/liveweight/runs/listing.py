"""What `liveweight list` prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from liveweight import _library, prune
from liveweight.runs.models import MODELS, build_model
from liveweight.runs.recipe import built_in_recipes

_FORMATS = (
    ("unstructured", "Linear, Conv2d", "single weights are missing; tiles of values and columns"),
    ("bitmap", "Linear", "the same on a GPU: one bit for each weight, values in fragment order"),
    ("delta", "Linear", "the same on a GPU where little is kept: values and packed gaps"),
    (
        "nm",
        "Linear",
        "at most n of every m weights of a row are kept, as 2:4; stored as single weights",
    ),
    (
        "semi_structured",
        "Linear",
        "2:4 on a GPU: values and indices as sparse tensor cores read them",
    ),
    ("block", "Linear, Conv2d", "whole blocks are missing; panels of rows, chunks of columns"),
    ("kernelwise", "Conv2d", "whole 2-D kernels weight[o, i] are missing; direct convolution"),
    ("dense", "any", "the module as it was; always a candidate of compress_"),
)


def columns(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return aligned plain text."""
    lines = [list(headers), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headers))]
    pairs = [zip(line, widths, strict=True) for line in lines]
    return "\n".join("  ".join(v.ljust(w) for v, w in pair).rstrip() for pair in pairs)


def recipes() -> str:
    rows = []
    for name, path in built_in_recipes().items():
        comment = [s[1:].strip() for s in path.read_text().splitlines() if s.startswith("#")]
        rows.append((name, " ".join(comment).partition(". ")[0].rstrip(".:")))
    return columns(("recipe", "what it does"), rows)


def importances() -> str:
    rows = []
    for name, factory in prune.importances.items():
        importance = factory()
        by = {kind: importance.default_granularity(kind) for kind in ("conv", "linear")}
        units = set(by.values()) == {"neuron"}
        default = "; ".join(f"{what} ({kind})" for kind, what in by.items())
        needs = [n for n in ("data", "labels", "gradients") if getattr(factory, f"needs_{n}", 0)]
        cost = getattr(importance, "cost", "a look at the weights")
        cells = (name, ", ".join(needs) or "nothing", "neuron" if units else default)
        rows.append((*cells, "neuron" if units else "all", cost, _source(importance)))
    headers = ("importance", "needs", "granularity by default", "possible", "cost", "what it is")
    return columns(headers, rows)


def _source(importance: object) -> str:
    """Return the first sentence of the docstring and the source it names."""
    text = " ".join((type(importance).__doc__ or "").split())
    first = text.partition(". ")[0].rstrip(".")
    _, found, source = text.partition("Source: ")
    return f"{first} ({source.partition('. ')[0].rstrip('.')})" if found else first


def formats() -> str:
    return columns(("format", "layers", "what is stored"), _FORMATS)


def models() -> str:
    rows = []
    for name, factory in MODELS.items():
        with torch.device("meta"):  # shapes without values
            size = sum(p.numel() for p in build_model(name).parameters())
        rows.append((name, f"{size:,}", (factory.__doc__ or "").partition("\n")[0]))
    rows.append(("package.module:factory", "", "any callable that returns an nn.Module"))
    return columns(("model", "weights", "what it is"), rows)


def ops() -> str:
    table = _library.backends()
    return columns(("op", "cpu", "cuda"), [(op, d["cpu"], d["cuda"]) for op, d in table.items()])


LISTS: dict[str, Callable[[], str]] = {
    "recipes": recipes,
    "importances": importances,
    "formats": formats,
    "models": models,
    "ops": ops,
}
