"""Neural burden: how much more every surviving connection of a pruned net carries."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from liveweight.prune.activity import observe
from liveweight.prune.batches import Batches, call, evaluating, model_devices
from liveweight.prune.importances import Target
from liveweight.prune.kernel_response import output_positions
from liveweight.prune.mask import own_mask
from liveweight.prune.nnrelief import NNRelief
from liveweight.prune.passes import Scoring
from liveweight.prune.report import format_table
from liveweight.prune.selectors import Selector, choose_layers, layer_kind


@dataclass
class BurdenRow:
    """One layer of a pruned net beside the same layer of its dense twin.

    density     weights kept / weights
    load        mean over its living units of l_j in the pruned net, and of the dense one's units
    burden      mean and 90th percentile of b_j over its living units
    gini        Gini coefficient of l_j over its living units, and the dense layer's
    error       relative reconstruction error of the layer's output
    dead_units  units without any connection, left out above
    """

    name: str
    density: float
    load: float
    dense_load: float
    burden: float
    burden_p90: float
    gini: float
    dense_gini: float
    error: float
    dead_units: int


@dataclass
class BurdenReport:
    """Burden of a pruned net: a row per layer, and `network` over the units of all of them."""

    layers: list[BurdenRow]
    network: BurdenRow

    def table(self) -> str:
        """Return one line per layer and one for the network."""
        header = ["layer", "density", "load", "dense", "burden", "90 %", "Gini", "dense", "error",
                  "dead units"]  # fmt: skip
        rows = [
            [
                r.name, f"{r.density:.2%}", f"{r.load:.3g}", f"{r.dense_load:.3g}",
                f"{r.burden:.2f}x", f"{r.burden_p90:.2f}x", f"{r.gini:.3f}", f"{r.dense_gini:.3f}",
                f"{r.error:.2%}", f"{r.dead_units:,}",
            ]
            for r in (*self.layers, self.network)
        ]  # fmt: skip
        return format_table(header, rows, left=1)

    def to_json(self) -> str:
        """Return the report as a JSON object."""
        rows = {"layers": [asdict(r) for r in self.layers], "network": asdict(self.network)}
        return json.dumps(rows, indent=1)

    def plot(self, path: str | pathlib.Path) -> None:
        """Draw burden and load concentration by layer into a file. ImportError: no matplotlib."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 1.2 + 0.34 * len(self.layers)), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, sharey=True)
        places, names = range(len(self.layers)), [r.name for r in self.layers]
        left.barh(places, [r.burden for r in self.layers], color="#1b7f4d", label="mean")
        p90 = [r.burden_p90 for r in self.layers]
        left.plot(p90, places, "o", color="#5b6b7b", label="90th percentile")
        left.axvline(1.0, color="#9aa5b1", linewidth=1)
        left.set_xlabel("burden, times dense")
        right.plot([r.gini for r in self.layers], places, "o", color="#1b7f4d", label="pruned")
        right.plot([r.dense_gini for r in self.layers], places, "s", color="#9aa5b1", label="dense")
        right.set_xlabel("Gini coefficient of the load")
        left.set_yticks(list(places), names)
        left.invert_yaxis()
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False, fontsize=8)
        figure.savefig(path, dpi=150)

    def __str__(self) -> str:
        return self.table()


@dataclass
class _Loads:
    """Of one layer of one net: load [out], connections kept [out], units alive [out]."""

    load: Tensor
    fan_in: Tensor
    alive: Tensor
    kept: int
    total: int


def burden(
    model: nn.Module,
    dense: nn.Module,
    data: Iterable,
    *,
    layers: Selector | Iterable[Selector] | None = None,
    ignore: Selector | Iterable[Selector] | None = None,
    steps: int | None = None,
) -> BurdenReport:
    """Compare the load of every unit of a pruned, trained net with its dense, trained twin.

        l_j = mean over samples of sum_i |w_ij x_i| + |b_j|     (convolutions: per output position)
        b_j = (l_j / kept inputs of j) / (l_j of the dense unit / all inputs of j)

    A burden of 2 says that a surviving connection carries twice what one of the dense unit does.
    error is ||f(X) - f_m(X)||^2 / ||f(X)||^2, of a layer's output or the network's. Units that lost
    every connection are counted and left out. This is our operational definition: the paper that
    names neural burden gives no public formula.

    model    masked or stripped; what is zero is pruned
    dense    a net of the same class with layers of the same names and sizes
    data     batches, taken twice
    returns  BurdenReport: .layers, .network, .table(), .to_json(), .plot(path)

    Raises ValueError where the nets do not match, for empty data, data on another device and NaN
    activations; TypeError for wrong types. Both nets stay as they are.
    Source of the name: Wang, Dai, Zhou, Qi, Zhou, arXiv 2407.16716.
    """
    for name, net in (("model", model), ("dense", dense)):
        if not isinstance(net, nn.Module):
            raise TypeError(f"{name} must be an nn.Module, got {type(net).__name__}")
    if isinstance(data, Iterator):
        data = list(Batches(data, steps))
    chosen, _, _ = choose_layers(model, layers, ignore)
    _check_twins(chosen, dense)
    ours = _loads(model, chosen, Batches(data, steps))
    theirs = _loads(dense, {n: dense.get_submodule(n) for n in chosen}, Batches(data, steps))
    errors = _errors(model, dense, list(ours), Batches(data, steps))
    rows, units = [], []
    for name, mine in ours.items():
        if name not in theirs:
            continue
        rows.append(_row(name, mine, theirs[name], errors[name]))
        units.append((mine, theirs[name]))
    if not rows:
        raise ValueError("burden: the data reaches none of the layers")
    joined = [_join([pair[i] for pair in units]) for i in (0, 1)]
    return BurdenReport(rows, _row("network", *joined, errors[""]))


def _check_twins(chosen: dict[str, nn.Module], dense: nn.Module) -> None:
    others = dict(dense.named_modules())
    for name, module in chosen.items():
        twin = others.get(name)
        if twin is None or layer_kind(twin) != layer_kind(module):
            raise ValueError(f"burden: the dense net has no {type(module).__name__} {name!r}")
        if twin.weight.shape != module.weight.shape:
            raise ValueError(
                f"burden: layer {name!r} is {list(module.weight.shape)} in the model and "
                f"{list(twin.weight.shape)} in the dense net"
            )


def _loads(net: nn.Module, chosen: dict[str, nn.Module], data: Iterable) -> dict[str, _Loads]:
    """Return loads by layer name, for layers that the data reaches."""
    importance = NNRelief(norm="l1", cleanup=False)
    targets = {}
    for name, module in chosen.items():
        kind = layer_kind(module)
        targets[name] = Target(name, module, kind, importance.default_granularity(kind))
    scoring = Scoring(importance, targets)
    called = observe(net, scoring.watches, data)
    scoring.called |= called
    seen = {watch.name: watch.observer for watch in scoring.watches}
    found = {}
    for name, score in scoring.scores().items():
        module = targets[name].module
        load = score.unit_total.double()
        if targets[name].kind == "conv":
            load = load / output_positions(module, seen[name].shape)
        keep = module.weight.detach() != 0
        mask = own_mask(module, "weight")
        keep = keep if mask is None else mask  # a weight may be zero by chance
        fan_in = keep.flatten(1).sum(1).double()
        found[name] = _Loads(load, fan_in, fan_in > 0, int(keep.sum()), keep.numel())
    return found


def _join(parts: list[_Loads]) -> _Loads:
    tensors = [torch.cat([getattr(p, f) for p in parts]) for f in ("load", "fan_in", "alive")]
    return _Loads(*tensors, sum(p.kept for p in parts), sum(p.total for p in parts))


def _row(name: str, mine: _Loads, theirs: _Loads, error: float) -> BurdenRow:
    alive = mine.alive & theirs.alive & (theirs.load > 0)
    each = mine.load[alive] / mine.fan_in[alive]
    dense = theirs.load[alive] / theirs.fan_in[alive]
    ratios = each / dense
    none = not bool(alive.any())
    return BurdenRow(
        name,
        mine.kept / mine.total if mine.total else 1.0,
        0.0 if none else float(mine.load[alive].mean()),
        float(theirs.load.mean()) if theirs.load.numel() else 0.0,
        float("nan") if none else float(ratios.mean()),
        float("nan") if none else float(ratios.quantile(0.9)),
        gini(mine.load[alive]),
        gini(theirs.load),
        error,
        int((~mine.alive).sum()),
    )


def gini(values: Tensor) -> float:
    """Return the Gini coefficient of values >= 0: 0 where all are equal, near 1 where one has all.

    sum_ij |v_i - v_j| / (2 n sum_i v_i); 0 where there are none or all are 0.
    """
    total = float(values.sum())
    if total == 0:
        return 0.0
    ranked = values.double().sort().values
    n = ranked.numel()
    rank = torch.arange(1, n + 1, dtype=torch.float64, device=ranked.device)
    return float((2 * (rank * ranked).sum() / (n * ranked.sum())) - (n + 1) / n)


@torch.no_grad()
def _errors(
    model: nn.Module, dense: nn.Module, names: list[str], data: Iterable
) -> dict[str, float]:
    """Return ||f - f_m||^2 / ||f||^2 of every layer's output and, under "", the network's."""
    sums = {name: [0.0, 0.0] for name in (*names, "")}
    devices = model_devices(model)
    with evaluating(model), evaluating(dense):
        for batch in data:
            outputs = []
            for net in (model, dense):
                with _catching(net, names) as caught:
                    caught[""], _ = call(net, batch, devices)
                outputs.append(caught)
            for name, (change, size) in sums.items():
                ours, theirs = (o.get(name) for o in outputs)
                if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
                    change += float((ours.double() - theirs.double()).square().sum())
                    size += float(theirs.double().square().sum())
                    sums[name] = [change, size]
    return {n: change / size if size else 0.0 for n, (change, size) in sums.items()}


class _catching:
    """Collects the outputs of some layers by name while it is open."""

    def __init__(self, net: nn.Module, names: list[str]) -> None:
        self._net, self._names = net, names

    def __enter__(self) -> dict[str, object]:
        caught: dict[str, object] = {}

        def catcher(name: str):
            return lambda module, args, output: caught.__setitem__(name, output)

        self._handles = [
            self._net.get_submodule(n).register_forward_hook(catcher(n)) for n in self._names
        ]
        return caught

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
