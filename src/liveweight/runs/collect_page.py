"""The Markdown of a page over several runs, from their compact results alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from liveweight.runs.budget import describe, fitted
from liveweight.runs.collect import FinishedRun, Group, built_in, comparable
from liveweight.runs.folder import differing_keys
from liveweight.runs.nnrelief_claims import NOT_PUBLIC, paper_claims
from liveweight.runs.recipe import built_in_recipes
from liveweight.runs.report import setting, table
from liveweight.runs.spread import claims, spread

_HOW = (
    "Written by `liveweight report` from the run folders; no figure is typed by hand. ±: sample "
    "standard deviation over seeds. Epoch and iteration were chosen on the validation set; the "
    "test set was opened once, afterwards. `weights` counts convolution kernels and biases and "
    "linear weights and biases; `all parameters` adds the rest, such as BatchNorm's. Differences "
    "of accuracy are compressed minus dense of the same seed, in points. Speed: median of one "
    "forward pass, all models of a table in turns on the same input; speed-ups are medians over "
    "paired rounds, against the dense model as it stands (eager) and as torch.compile makes it."
)
_EAGER, _COMPILED = "dense", "dense, torch.compile"


def render(groups: Sequence[Group], drawn: Sequence[str] = ()) -> str:
    """Return README.md of a page; drawn are the plots' file names."""
    names = ", ".join(group.name for group in groups)
    parts = [f"# Pruning runs: {names}", _HOW, _summary(groups)]
    if found := [claim for group in groups for claim in paper_claims(group)]:
        parts += ["## The paper's claims", claims(found), NOT_PUBLIC]
    for group in groups:
        parts += _section(group, drawn)
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(group: Group, drawn: Sequence[str]) -> list[str]:
    def picture(name: str, text: str) -> str:
        file = f"{group.name}-{name}.png"
        return f"![{text}]({file})" if file in drawn else ""

    first = fitted(group.recipe, group.runs[0].result.get("budget"))
    notes = dict.fromkeys(note for run in group.runs for note in run.result["notes"])
    return [
        f"## {group.name}",
        _command(group),
        _budgets(group),
        setting(first, _facts(group), group.seeds),
        "### Each seed",
        _seeds(group),
        "### Iterations",
        _iterations(group),
        picture("accuracy", "Accuracy against weights left, every seed"),
        "### Layers of the kept models",
        _layers(group),
        "### Speed",
        _speed(group),
        picture("speed", "Time of one forward pass"),
        "### Notes" if notes else "",
        "\n".join(f"- {note}" for note in notes),
    ]


def _command(group: Group) -> str:
    where = "" if group.recipe.data.path is None else " --data.path DATA"
    text = f"`liveweight prune {group.name}.yaml{where} --seed SEED --out FOLDER`"
    known = [name for name in built_in_recipes() if group.name.startswith(name)]
    if not known:
        return text + "."
    name = max(known, key=len)
    changed = differing_keys(comparable(built_in(name)), comparable(group.recipe))
    if not changed:
        return f"{text}; the built-in recipe `{name}` as it ships."
    keys = "; ".join(f"`{key}`" for key in changed)
    return f"{text}; the built-in recipe `{name}` with these keys changed: {keys}."


def _facts(group: Group) -> dict:
    """Return machine and data facts of all runs; where they differ, each is named."""
    found: dict[str, list[str]] = {}
    for run in group.runs:
        for key, value in run.result["machine"].items():
            found.setdefault(key, []).append(value[:10] if key == "date" else value)
    machine = {key: ", ".join(dict.fromkeys(values)) for key, values in found.items()}
    minutes = [sum(row["seconds"] for row in run.result["iterates"]) / 60 for run in group.runs]
    machine["minutes of training"] = spread(minutes, 1)
    return {"machine": machine, "data": group.runs[0].result["data"]}


def _budgets(group: Group) -> str:
    """Return what a budget of time made of each run's epochs."""
    found = {
        run.recipe.seed: describe(run.recipe, run.result["budget"])
        for run in group.runs
        if run.result.get("budget")
    }
    if len(found) == len(group.runs) and len(set(found.values())) == 1:
        return found[group.seeds[0]]
    return "\n".join(f"- seed {seed}: {text}" for seed, text in found.items())


def _factor(values: Sequence[float | None]) -> str:
    """Return the spread of factors; "-" where any was not measured."""
    if not values or any(value is None for value in values):
        return "-"
    return spread(values, 2 if statistics.fmean(values) < 10 else 1) + "x"


def _summary(groups: Sequence[Group]) -> str:
    sizes = list(dict.fromkeys(size for group in groups for size in group.batches))
    headers = ["recipe", "seeds", "weights left", "fewer", "test dense", "test compressed"]
    headers += ["difference", "file smaller"]
    headers += [f"batch {size}: to {who}" for size in sizes for who in ("dense", "torch.compile")]
    rows = []
    for group in groups:
        pick = group.values
        row = [
            group.name,
            len(group.runs),
            _count(pick(lambda r: r.kept["kept"])),
            _factor(pick(lambda r: r.fewer)),
            _accuracy(pick(lambda r: r.result["test"]["dense"])),
            _accuracy(pick(lambda r: r.result["test"]["compressed"])),
            _points(pick(lambda r: r.gain)),
            _factor(pick(lambda r: r.smaller)),
        ]
        for size in sizes:
            for name in (_EAGER, _COMPILED):
                row.append(_factor([run.speedup(size, name) for run in group.runs]))
        rows.append(row)
    return table(headers, rows)


def _accuracy(shares: Sequence[float]) -> str:
    return spread(shares, 2, 100) + " %"


def _count(values: Sequence[float]) -> str:
    return spread(values if len(set(values)) > 1 else values[:1], 0)


def _points(values: Sequence[float]) -> str:
    text = spread(values, 2)
    return text if text.startswith("-") else f"+{text}"


_COLUMNS: list[tuple[str, Callable[[FinishedRun], float], Callable[[list[float]], str]]] = [
    ("weights left", lambda r: r.kept["kept"], _count),
    ("fewer", lambda r: r.fewer, _factor),
    ("all parameters, fewer", lambda r: r.kept["total_all"] / max(r.kept["kept_all"], 1), _factor),
    ("validation dense", lambda r: r.result["iterates"][0]["validation_accuracy"], _accuracy),
    ("compressed", lambda r: r.result["validation"]["compressed"], _accuracy),
    ("test dense", lambda r: r.result["test"]["dense"], _accuracy),
    ("compressed", lambda r: r.result["test"]["compressed"], _accuracy),
    ("difference", lambda r: r.gain, _points),
    ("bytes", lambda r: r.result["files"]["checkpoint.safetensors"], _count),
    ("smaller", lambda r: r.smaller, _factor),
]


def _seeds(group: Group) -> str:
    rows = [
        [str(run.recipe.seed), str(run.result["chosen"])]
        + [write([pick(run)]) for _, pick, write in _COLUMNS]
        for run in group.runs
    ]
    if len(group.runs) > 1:
        mean = [write(group.values(pick)) for _, pick, write in _COLUMNS]
        rows.append(["**all**", "", *mean])
    headers = ["seed", "iteration kept", *[name for name, _, _ in _COLUMNS]]
    reasons = [f"seed {run.recipe.seed}: {run.result['reason']}" for run in group.runs]
    if len({run.result["reason"] for run in group.runs}) == 1:
        reasons = [group.runs[0].result["reason"]]
    return f"{table(headers, rows)}\n\nKept: {'; '.join(reasons)}."


def _iterations(group: Group) -> str:
    rows = []
    for i in range(len(group.runs[0].result["iterates"])):
        found = [run.result["iterates"][i] for run in group.runs]
        dense = [run.result["iterates"][0] for run in group.runs]
        losses = [
            100 * (row["test_accuracy"] - first["test_accuracy"])
            for row, first in zip(found, dense, strict=True)
        ]
        rows.append(
            [
                "dense" if i == 0 else str(i),
                _count([row["kept"] for row in found]),
                _factor([row["total"] / max(row["kept"], 1) for row in found]),
                _accuracy([row["validation_accuracy"] for row in found]),
                _accuracy([row["test_accuracy"] for row in found]),
                "-" if i == 0 else _points(losses),
                sum(run.result["chosen"] == i for run in group.runs),
            ]
        )
    headers = ["iteration", "weights left", "fewer", "validation", "test", "difference"]
    return table([*headers, "kept by seeds"], rows)


def _layers(group: Group) -> str:
    rows = []
    for i, first in enumerate(group.runs[0].result["layers"]):
        found = [run.result["layers"][i] for run in group.runs]
        kernels = ", ".join(dict.fromkeys(row["kernel"] for row in found))
        left = _count([row["kept"] for row in found])
        density = _accuracy([row["kept"] / row["total"] for row in found])
        rows.append([first["name"], left, f"{first['total']:,}", density, kernels])
    return table(["layer", "weights left", "of", "density", "runs as"], rows)


def _speed(group: Group) -> str:
    rows = []
    for batch in group.batches:
        for run in group.runs:
            rows.append([batch, run.recipe.seed, *_speeds([run], batch)])
        if len(group.runs) > 1:
            rows.append([batch, "**all**", *_speeds(group.runs, batch)])
    headers = ["batch", "seed", "dense, us", "torch.compile, us", "compressed, us"]
    return table([*headers, "to dense", "to torch.compile"], rows)


def _speeds(runs: Sequence[FinishedRun], batch: int) -> list[str]:
    """Return median times and speed-ups of the compressed model at a batch size."""
    cells = []
    for name in (_EAGER, _COMPILED, "compressed"):
        times = [rows[name]["median_us"] for r in runs if name in (rows := r.latency[batch])]
        cells.append(spread(times, 1) if len(times) == len(runs) else "-")
    ratios = ([r.speedup(batch, name) for r in runs] for name in (_EAGER, _COMPILED))
    return cells + [_factor(found) for found in ratios]
