"""The masks of the authors' own program, entry by entry."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from liveweight.prune import NNRelief, masks, prune_

ALPHA = {"conv": 0.9, "linear": 0.95}
LAYERS = {
    "lenet300": {f"classifier.{i}": f"classifier.{i}" for i in (0, 2, 4)},
    "lenet5": {
        "feature_extractor.0": "features.0",
        "feature_extractor.3": "features.2",
        "classifier.0": "classifier.0",
        "classifier.2": "classifier.2",
    },
}


@pytest.fixture(scope="module")
def golden(shared_data):
    path = shared_data / "nnrelief-golden.npz"
    if not path.exists():
        pytest.skip(f"no {path.name}")
    return np.load(path)


def _prune(golden, nets, net, **options):
    model = {"lenet300": nets.LeNet300, "lenet5": nets.LeNet5}[net]()
    start = f"{net}/before/"
    state = {
        k.removeprefix(start): torch.from_numpy(golden[k]) for k in golden if k.startswith(start)
    }
    model.load_state_dict(state)
    data = [torch.from_numpy(golden[f"{net}/input"])]
    report = prune_(model, data, importance=NNRelief(**options), alpha=ALPHA)
    return model, report


@pytest.mark.parametrize("net", LAYERS)
def test_every_mask_entry_is_the_authors(golden, nets, net):
    model, report = _prune(golden, nets, net, variant="authors", norm="l1", ties="authors")
    found = masks(model)
    different = {}
    for index, (ours, theirs) in enumerate(LAYERS[net].items()):
        part, _, position = theirs.partition(".")
        # The authors number the masks weight, bias, weight, bias, ... per part of the net.
        order = list(LAYERS[net].values())
        step = [n for n in order if n.startswith(part)].index(theirs) if part else index
        weight = torch.from_numpy(golden[f"{net}/mask/{part}.{2 * step}"]).bool()
        bias = torch.from_numpy(golden[f"{net}/mask/{part}.{2 * step + 1}"]).bool()
        different[f"{ours}.weight"] = int((found[f"{ours}.weight"] != weight).sum())
        own_bias = found.get(f"{ours}.bias", torch.ones_like(bias))
        different[f"{ours}.bias"] = int((own_bias != bias).sum())
    assert different == dict.fromkeys(different, 0)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, torch.from_numpy(golden[f"{net}/after/{name}"])), name


@pytest.mark.parametrize(("net", "dense"), [("lenet300", 266_610), ("lenet5", 431_080)])
def test_dense_counts_are_the_authors(golden, nets, net, dense):
    _, report = _prune(golden, nets, net, norm="l1")
    assert report.total == dense
    theirs = [golden[k] for k in golden if k.startswith(f"{net}/mask/")]
    kept = sum(int(np.count_nonzero(mask)) for mask in theirs)
    # The stable tie rule keeps at most one connection more per unit: close, not equal.
    assert abs(report.kept - kept) < 0.05 * kept
