"""Diagonals of the loss's second derivative by the weights, sample by sample and exactly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.func import grad, hessian, jvp, vjp, vmap

from liveweight.prune.loss import CHUNK_BYTES, LabelledData

CURVATURES = ("fisher", "gauss_newton", "exact")


def per_sample(
    run: LabelledData, data: Iterable, curvature: str
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Yield (g, h) by layer name, [samples, *weight] each, a chunk of samples at a time.

    g   gradients of the samples' losses
    h   "fisher": g^2; "gauss_newton": diag(J^T H J) with J the outputs' derivatives and H the
        loss's second derivative by the outputs
    """
    if curvature == "fisher":
        for found in run.per_sample(data):
            yield found, {name: g.square() for name, g in found.items()}
        return
    weights = run.detached()
    both = vmap(_gauss_newton(run), in_dims=(None, 0, 0), randomness="different")
    size = sum(w.numel() * w.element_size() for w in weights.values())
    for x, labels in run.batches(data):
        with torch.no_grad():
            outputs = run.outputs(weights, x[0]).numel() if len(x) else 1
        at_once = max(1, CHUNK_BYTES // max(1, size * (outputs + 1)))
        for part, tags in zip(x.split(at_once), labels.split(at_once), strict=True):
            run.check_losses(_losses(run, weights, part, tags))
            yield tuple({n: t.detach() for n, t in d.items()} for d in both(weights, part, tags))


@torch.no_grad()
def _losses(run: LabelledData, weights: dict[str, Tensor], x: Tensor, labels: Tensor) -> Tensor:
    """Return the samples' losses [samples]; a decomposition of NaN would only say it failed."""
    return vmap(run.function(), in_dims=(None, 0, 0), randomness="different")(weights, x, labels)


def _gauss_newton(run: LabelledData):
    def both(weights: dict[str, Tensor], x: Tensor, label: Tensor):
        outputs, back = vjp(lambda w: run.outputs(w, x), weights)
        by_output = grad(run.loss)(outputs, label.unsqueeze(0))
        second = hessian(run.loss)(outputs, label.unsqueeze(0))
        count = outputs.numel()
        values, vectors = torch.linalg.eigh(second.reshape(count, count))
        # H = S S^T; negative eigenvalues of a convex loss are rounding.
        root = (vectors * values.clamp_min(0).sqrt()).t().reshape(count, *outputs.shape)
        rows = vmap(lambda v: back(v)[0])(root)
        return back(by_output)[0], {name: r.square().sum(0) for name, r in rows.items()}

    return both


def exact_diagonal(run: LabelledData, data: Iterable) -> dict[str, Tensor]:
    """Return the diagonal of the Hessian of the mean loss: one product per weight, small nets only.

    Activations that are linear piece by piece (ReLU) have no curvature of their own.
    """
    weights = run.detached()
    total = {name: torch.zeros_like(w, dtype=torch.float64) for name, w in weights.items()}
    for x, labels in run.batches(data):
        samples = len(x)
        run.check_losses(_losses(run, weights, x, labels))

        def mean_loss(w: dict[str, Tensor], x: Tensor = x, labels: Tensor = labels) -> Tensor:
            return vmap(run.function(), in_dims=(None, 0, 0))(w, x, labels).mean()

        for name, weight in weights.items():
            total[name] += samples * _diagonal(mean_loss, weights, name, weight)
    return {name: t / run.samples for name, t in total.items()}


def _diagonal(loss, weights: dict[str, Tensor], name: str, weight: Tensor) -> Tensor:
    def gradient(w: Tensor) -> Tensor:
        return grad(loss)({**weights, name: w})[name]

    def entry(place: Tensor) -> Tensor:
        direction = torch.zeros_like(weight).flatten()
        direction = direction.scatter(0, place.unsqueeze(0), 1.0)
        product = jvp(gradient, (weight,), (direction.view_as(weight),))[1]
        return product.flatten().gather(0, place.unsqueeze(0))[0]

    places = torch.arange(weight.numel(), device=weight.device)
    return vmap(entry, chunk_size=64)(places).view_as(weight).detach().double()
