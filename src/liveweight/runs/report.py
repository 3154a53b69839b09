"""report.md of a run, from result.json alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence

from liveweight.runs import plots
from liveweight.runs.budget import describe, fitted
from liveweight.runs.folder import RunFolder
from liveweight.runs.recipe import Recipe

_WORD = re.compile("[A-Za-z]{4}")


def write_report(
    folder: RunFolder, recipe: Recipe, result: dict, say: Callable[[str], None] = print
) -> None:
    """Write plots, report.md and result.json, and say the summary; result.json marks the end.

    recipe   as it was asked for; what a budget made of it is in the result
    """
    drawn = []
    if recipe.report.plots:
        try:
            drawn = plots.draw(result, folder.path / "plots")
        except ImportError:
            say("no plots: matplotlib is not installed (pip install 'liveweight[plots]')")
    folder.write_text("report.md", render(recipe, result, drawn))
    folder.write_text("result.json", json.dumps(result, indent=1))
    say(summary(result))
    say(f"report: {folder.path / 'report.md'}")


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table that also reads as plain text; columns of figures are set right."""
    body = [[str(value).replace("|", "\\|") for value in row] for row in rows]
    right = [bool(body) and _figures([row[i] for row in body]) for i in range(len(headers))]
    widths = [max(len(row[i]) for row in [list(headers), *body]) for i in range(len(headers))]

    def line(row: Sequence[str]) -> str:
        places = zip(row, widths, right, strict=True)
        return "| " + " | ".join(v.rjust(w) if r else v.ljust(w) for v, w, r in places) + " |"

    rules = ["-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)]
    return "\n".join([line(headers), "|" + "|".join(rules) + "|", *map(line, body)])


def _figures(cells: Sequence[str]) -> bool:
    """Return whether a column holds figures: at most a unit behind each, "-" where one lacks."""
    words = [cell.lstrip("+-") for cell in cells if cell != "-"]
    return bool(words) and all(w[:1].isdigit() and not _WORD.search(w) for w in words)


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


def factor(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.1f}x"


def fewer(row: dict, suffix: str = "") -> str:
    return factor(row[f"total{suffix}"] / max(row[f"kept{suffix}"], 1))


def summary(result: dict) -> str:
    """Return the result in a few plain lines."""
    row, test = result["iterates"][result["chosen"]], result["test"]
    sizes = result["files"]
    lines = [
        f"weights:  {row['kept']:,} of {row['total']:,} ({fewer(row)} fewer)",
        f"test:     {percent(test['compressed'])}, dense {percent(test['dense'])}",
    ]
    for block in result["latency"]:
        rows = {r["name"]: r for r in block["rows"]}
        ours = rows["compressed"]
        text = f"batch {block['batch']:<3} {ours['median_us']:.0f} us, {factor(ours['speedup'])}"
        text += f" dense ({rows['dense']['median_us']:.0f} us)"
        if other := rows.get("dense, torch.compile"):
            ratio = ours["speedup"] / other["speedup"]
            text += f", {factor(ratio)} torch.compile'd dense ({other['median_us']:.0f} us)"
        lines.append(text)
    small, big = sizes["checkpoint.safetensors"], sizes["dense.safetensors"]
    lines.append(f"file:     {small:,} bytes, dense {big:,} ({factor(big / small)} smaller)")
    return "\n".join(lines)


def render(recipe: Recipe, result: dict, drawn: Sequence[str] = ()) -> str:
    """Return report.md; drawn are the plots' file names."""
    parts = [
        f"# {recipe.model.name} pruned by {recipe.prune.importance}",
        "```\n" + summary(result) + "\n```",
        describe(recipe, budget) if (budget := result.get("budget")) else "",
        setting(fitted(recipe, result.get("budget")), result),
        "## Iterations",
        _iterates(result),
        _picture(drawn, "accuracy.png", "Accuracy against weights left"),
        "## Layers",
        _layers(result),
        _picture(drawn, "density.png", "Share of weights left per layer"),
        "## Shrink and compress",
        _shrink(result),
        _choices(result),
        "## Latency",
        *[_latency(block) for block in result["latency"]],
        "Median of one forward pass; all models of a table take turns on the same input, speed-ups "
        "are medians over paired rounds. "
        f"{result['machine']['CPU']}, {result['machine']['threads']} threads, "
        f"device {result['machine']['device']}.",
        _picture(drawn, "latency.png", "Latency per sample batch"),
        "## Files",
        table(["file", "bytes"], [(n, f"{size:,}") for n, size in result["files"].items()]),
    ]
    if result["notes"]:
        parts += ["## Notes", "\n".join(f"- {note}" for note in result["notes"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def _picture(drawn: Sequence[str], name: str, text: str) -> str:
    return f"![{text}](plots/{name})" if name in drawn else ""


def setting(recipe: Recipe, result: dict, seeds: Sequence[int] | None = None) -> str:
    """Return the table of what was done and where; seeds: of all the runs that it stands for."""
    prune, data = recipe.prune, result["data"]
    goal = f"alpha {_plain(prune.alpha)}"
    if prune.sparsity is not None:
        goal = f"sparsity {prune.sparsity}"
    if prune.goal is not None:
        goal = f"to {prune.goal}"
    rows = [
        ("model", f"{recipe.model.name} {_plain(recipe.model.arguments)}".strip()),
        ("data", f"{recipe.data.source}: " + ", ".join(f"{n} {k}" for k, n in data.items())),
        ("training", _training(recipe.train)),
        ("pruning", f"{_criterion(prune)}, {goal}, {prune.iterations} times"),
        ("pruning set", f"{prune.samples} training samples"),
        ("rewind", prune.rewind if isinstance(prune.rewind, str) else f"epoch {prune.rewind}"),
        ("retraining", _training(recipe.retrain)),
        ("seed" if seeds is None else "seeds", ", ".join(map(str, seeds or [recipe.seed]))),
        *result["machine"].items(),
    ]
    return table(["what", "setting"], rows)


def _plain(value: object) -> str:
    if not isinstance(value, dict):
        return str(value)
    return ", ".join(f"{key} {item}" for key, item in value.items())


def _criterion(prune) -> str:
    return prune.importance + (f" ({_plain(prune.options)})" if prune.options else "")


def _training(train) -> str:
    steps = f", x{train.gamma:g} at {train.milestones}" if train.milestones else ""
    return (
        f"{train.epochs} epochs, {train.optimizer} {train.lr:g}{steps}, "
        f"weight decay {train.weight_decay:g}, batch {train.batch_size}"
    )


def _iterates(result: dict) -> str:
    rows = []
    for row in result["iterates"]:
        name = "dense" if row["iteration"] == 0 else str(row["iteration"])
        kept = row["iteration"] == result["chosen"]
        rows.append(
            (
                name + (" (kept)" if kept else ""),
                f"{row['kept']:,}",
                fewer(row),
                f"{row['kept_all']:,}",
                fewer(row, "_all"),
                percent(row["validation_accuracy"]),
                percent(row.get("test_accuracy")),
                row["epoch"],
                f"{row['seconds']:.0f}",
            )
        )
    headers = ["iteration", "weights", "fewer", "all parameters", "fewer", "validation", "test"]
    text = table([*headers, "best epoch", "seconds"], rows)
    return (
        f"{text}\n\nKept: {result['reason']}. The choice of epochs and of the iteration rests on "
        "the validation set; the test column is information. `weights` counts convolution kernels "
        "and biases and linear weights and biases; `all parameters` adds the rest, such as "
        f"BatchNorm's.\n\nFinal model: validation {percent(result['validation']['compressed'])} "
        f"({percent(result['validation']['pruned'])} before shrink and compress), "
        f"test {percent(result['test']['compressed'])}, dense {percent(result['test']['dense'])}."
    )


def _layers(result: dict) -> str:
    row = result["iterates"][result["chosen"]]
    rows = [
        (r["name"], f"{r['kept']:,}", f"{r['total']:,}", percent(r["kept"] / r["total"]))
        for r in row["rows"]
    ]
    return table(["layer", "weights left", "of", "density"], rows)


def _shrink(result: dict) -> str:
    report = result["compress"]["shrink"]
    if report is None:
        return "The recipe does not shrink."
    rows = [
        (
            r["name"],
            f"{r['units_before']} -> {r['units_after']}",
            f"{r['inputs_before']} -> {r['inputs_after']}",
            r.get("note") or "",
        )
        for r in report["layers"]
    ]
    size = f"{report['parameters_before']:,} -> {report['parameters_after']:,} parameters"
    notes = "".join(f"\n{note}" for note in report.get("notes", []))
    return table(["layer", "units", "inputs", "note"], rows) + f"\n\n{size}{notes}"


def _choices(result: dict) -> str:
    report = result["compress"]["choices"]
    if report is None:
        return "Every layer runs dense kernels."
    rows = [
        (
            r["name"],
            r["chosen"],
            percent(r["density"]),
            factor(r["speedup"]),
            ", ".join(f"{name} {us:.1f}" for name, us in r["candidates"].items()),
            " + ".join(r["parts"]),
            r["reason"],
        )
        for r in report["layers"]
    ]
    headers = ["layer", "chosen", "density", "speed-up", "candidates, us", "joined", "reason"]
    where = f"Choices as measured at batch {result['compress']['chosen_at']}."
    notes = "".join(f"\n{note}" for note in report.get("notes", []))
    return f"{table(headers, rows)}\n\n{where}{notes}"


def _latency(block: dict) -> str:
    rows = [(r["name"], f"{r['median_us']:.1f}", factor(r["speedup"])) for r in block["rows"]]
    return table([f"batch {block['batch']}", "median, us", "speed-up"], rows)
