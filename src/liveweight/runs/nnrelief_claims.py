"""What is public of NNrelief's results (arXiv 2109.10795), beside what runs of it reached."""

from __future__ import annotations

from liveweight.runs.collect import Group
from liveweight.runs.spread import Claim, above, both, spread

# "Comparable performance" is not a number in what is public; this one is our definition.
COMPARABLE_POINTS = 0.5

NOT_PUBLIC = (
    "Only these sentences of the paper are public to us (its abstract and a published summary); "
    "the cells of its tables (error, share retained, FLOPs) are not, so nothing here is set beside "
    f"them. Our definitions: accuracy is comparable where it is at most {COMPARABLE_POINTS:g} "
    "points below dense on the test set; a claim is decided where the mean over seeds is more than "
    "two standard errors away from its bound, and undecided otherwise, as with a single seed."
)


def paper_claims(group: Group) -> list[Claim]:
    """Return the paper's claims that a group of runs speaks to: NNrelief on MNIST or CIFAR."""
    recipe = group.recipe
    if recipe.prune.importance != "nnrelief":
        return []
    fewer = group.values(lambda run: run.fewer)
    gains = group.values(lambda run: run.gain)
    close = above(gains, -COMPARABLE_POINTS)
    seen = (
        f"{group.name}: {spread(fewer, 1)} times fewer weights, test accuracy "
        f"{spread(gains, 2)} points from dense ({_count(group)})"
    )
    model = recipe.model.name
    if model.startswith("lenet") and "mnist" in group.name:
        return [Claim(f"comparable performance for LeNet on MNIST ({model})", seen, close)]
    if model.startswith("vgg") and "cifar10" in group.name and "cifar100" not in group.name:
        text = "more than 50 times fewer weights for VGG on CIFAR-10, at comparable accuracy"
        return [Claim(text, seen, both(above(fewer, 50), close))]
    if model.startswith(("vgg", "resnet")) and "cifar" in group.name:
        text = "higher compression than the state of the art for VGG and ResNet on CIFAR"
        return [Claim(text, f"{seen}; the figures to compare with are not public", None)]
    return []


def _count(group: Group) -> str:
    text = f"{len(group.runs)} seed{'s' if len(group.runs) > 1 else ''}"
    shortened = any((run.result.get("budget") or {"factor": 1})["factor"] < 1 for run in group.runs)
    return f"{text}, training shortened" if shortened else text
