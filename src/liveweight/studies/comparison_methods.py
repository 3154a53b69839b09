"""What the comparison compares: selection methods, what they leave, and the bytes that it takes."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from liveweight import prune
from liveweight.compress import shrink_
from liveweight.prune import LayerScore, Target

VALUE_BYTES = 4  # float32
_INDEX_BYTES = 2  # of a column, where a layer has at most 65,536
_START_BYTES = 4  # where a row begins


@dataclass(frozen=True)
class Method:
    """A way to choose what goes.

    make(seed, masks)   the importance; masks: the most that dropout damage may draw
    granularities       where it makes sense
    merges              whether similar units stand in for those that go
    scored_once         whether it is worth keeping the scores of a dense net for all sparsities
    """

    make: Callable[[int, int], prune.Importance]
    granularities: tuple[str, ...] = ("weight", "neuron")
    merges: bool = False
    scored_once: bool = False


METHODS: dict[str, Method] = {
    "random": Method(lambda seed, _: prune.Random(seed)),
    "magnitude": Method(lambda *_: prune.Magnitude()),
    "obd": Method(lambda *_: prune.Obd("fisher"), scored_once=True),
    **{
        f"obd_sd-{reading}": Method(lambda *_, r=reading: prune.ObdSd(r), scored_once=True)
        for reading in ("standard-deviation", "signed-derivative")
    },
    "dropout_damage": Method(
        lambda seed, masks: prune.DropoutDamage(masks=masks, wobble=0.0, seed=seed),
        ("neuron",),
        scored_once=True,
    ),
    "merging": Method(lambda *_: prune.Magnitude(), ("neuron",), merges=True),
    # Without the clean-up all methods keep the same number of weights.
    "nnrelief": Method(lambda *_: prune.NNRelief(cleanup=False)),
}
READINGS = tuple(name for name in METHODS if name.startswith("obd_sd"))


class Given:
    """Scores that are known already: float32 in the shape of each layer's weight, by its name."""

    name = "given"

    def __init__(self, scores: Mapping[str, Tensor]) -> None:
        self._scores = scores

    def default_granularity(self, kind: str) -> str:
        return "weight"

    def observer(self, target: Target) -> None:
        return None

    def score(self, target: Target, seen: None) -> LayerScore:
        return LayerScore(self._scores[target.name])


def connection_scores(
    method: str, model: nn.Module, data: Iterable, *, seed: int, masks: int
) -> dict[str, Tensor]:
    """Return a method's scores of single weights by layer name; those of a unit are their sums.

    data is what the importance needs: batches (input, labels). Dropout damage scores hidden layers
    only, in equal shares of a unit's weights.
    """
    importance = METHODS[method].make(seed, masks)
    if importance.default_granularity("linear") != "neuron":
        found = prune.score(model, data, importance=importance, granularity="weight")
        return dict(found)
    units = prune.score(model, data, importance=importance, ignore=output_layer(model))
    weights = {name: model.get_submodule(name).weight for name in units}
    return {
        name: (units[name] / w[0].numel()).view(-1, *[1] * (w.dim() - 1)).expand_as(w).contiguous()
        for name, w in weights.items()
    }


def weighted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the Linear and Conv2d layers by name, in order."""
    found = model.named_modules()
    return {name: m for name, m in found if isinstance(m, (nn.Linear, nn.Conv2d))}


def output_layer(model: nn.Module) -> str:
    """Return the name of the last layer, whose units are the classes and stay."""
    return list(weighted_layers(model))[-1]


def cut_(
    model: nn.Module,
    method: str,
    importance: prune.Importance,
    data: Iterable,
    *,
    granularity: str,
    sparsity: float,
    scope: str,
) -> str:
    """Prune the model and return the sha256 of its masks; they stay attached."""
    options = {"importance": importance, "sparsity": sparsity, "scope": scope}
    options["ignore"] = output_layer(model) if granularity == "neuron" else None
    if METHODS[method].merges:
        prune.merge_(model, data, similarity="activations", **options)
    else:
        prune.prune_(model, data, granularity=granularity, **options)
    return masks_hash(model)


def masks_hash(model: nn.Module) -> str:
    """Return the sha256 of all masks: parameter names, shapes and entries, by name."""
    digest = hashlib.sha256()
    for name, mask in sorted(prune.masks(model).items()):
        digest.update(f"{name} {list(mask.shape)} ".encode())
        digest.update(mask.cpu().numpy().tobytes())
    return digest.hexdigest()


def smaller(model: nn.Module, example: Tensor) -> nn.Module:
    """Return a dense net without the units that a model's masks removed: it computes the same."""
    small = copy.deepcopy(model)
    prune.strip_(small)
    shrink_(small, example)
    return small


def widths(model: nn.Module) -> list[int]:
    """Return the units of each layer, in order."""
    return [m.weight.shape[0] for m in weighted_layers(model).values()]


def pruned_bytes(model: nn.Module) -> int:
    """Return the bytes of a net's float32 parameters, its masked weights stored sparsely.

        values:   4 kept;  places, the smaller of: 1 bit per weight, and CSR's indices
                  (2 per kept weight for the column, 4 (rows + 1) for where rows begin)

    A layer that takes no less this way counts dense: 4 per weight. Biases and the rest count 4
    each. In memory and on disk other layouts may be smaller still; entropy coding is left out.
    """
    total = VALUE_BYTES * sum(p.numel() for p in model.parameters())
    for module in weighted_layers(model).values():
        weight = module.weight
        mask = prune.masks(module).get("weight")
        if mask is None:
            continue
        kept, rows = int(mask.sum()), weight.shape[0]
        index = _INDEX_BYTES * kept + _START_BYTES * (rows + 1)
        places = -(-weight.numel() // 8)
        if weight[0].numel() <= 2 ** (8 * _INDEX_BYTES):
            places = min(places, index)
        saved = VALUE_BYTES * (weight.numel() - kept) - places
        total -= max(0, saved)
    return total


def quantized_bytes(model: nn.Module, rows: Iterable[prune.QuantizedRow]) -> int:
    """Return the bytes of a net whose weights were quantized; the other parameters are float32."""
    rows = list(rows)
    others = sum(p.numel() for p in model.parameters()) - sum(row.weights for row in rows)
    return sum(row.bytes for row in rows) + VALUE_BYTES * others
