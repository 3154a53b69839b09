"""The page of GPU results: machine, targets, and every case, losses included."""

from __future__ import annotations

from collections.abc import Iterable

from gpu.targets import judge

HOW = """Times are medians (quartiles) in microseconds of one call inside a CUDA graph, inputs
rotated through several times the L2 cache, the calls of a case replayed in turns; "small calls" are
timed as Python makes them. Ratio: time of the fastest dense call of the case over this one's;
**below 1 is a loss**. To sparse: the same against the fastest call of another sparse library.
Limit: the time that the useful operations at this run's own cuBLAS rate, or the bytes at its own
copy rate, would take, over the measured time."""


def markdown(result: dict) -> str:
    """Return the page of a result; one without rows says that nothing was measured."""
    rows = result.get("rows", [])
    lines = ["# GPU results", ""]
    if rows:
        lines += [f"* {key}: {value}" for key, value in result["machine"].items()]
        lines += [f"* tests: {result['tests']['summary']}"]
        lines += [f"* compute-sanitizer: {result.get('sanitizers', 'not run')}"]
        lines += [f"* problem: {text}" for text in result["problems"]]
        lines += ["", HOW]
    else:
        lines += [
            "Nothing has been measured on a GPU yet: `make gpu` does it and writes this page."
        ]
    lines += ["", "## Targets", "", *_targets(rows)]
    for name, text in result.get("plots", {}).items():
        lines += ["", f"![{text}]({name})"]
    limits = roofline(rows)
    groups = list(dict.fromkeys(row["group"] for row in rows))
    for group in groups:
        lines += ["", f"## {group}", ""]
        lines += ["| case | call | us | ratio | to sparse | limit | note |"]
        lines += ["|---|---|--:|--:|--:|--:|---|"]
        lines += [_line(row, limits) for row in rows if row["group"] == group]
    return "\n".join([*lines, ""])


def _targets(rows: Iterable[dict]) -> list[str]:
    lines = [
        "| what | floor | goal | measured | | cases | worst |",
        "|---|--:|--:|--:|---|--:|---|",
    ]
    for verdict in judge(rows):
        t = verdict.target
        goal = "" if t.goal is None else f"{t.goal:g}x"
        measured = "" if verdict.measured is None else f"{verdict.measured:.2f}x"
        word = f"**{verdict.words}**" if verdict.words == "missed" else verdict.words
        cells = (t.case, f"{t.floor:g}x", goal, measured, word, verdict.rows or "", verdict.worst)
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return lines


def roofline(rows: Iterable[dict]) -> dict[str, float]:
    """Return {"compute": FLOP/s, "memory": bytes/s} as measured in this run, 0 where it was not."""
    limits = {"compute": 0.0, "memory": 0.0}
    for row in rows:
        if row["group"] == "peak":
            amount = row["flops"] if row["where"]["what"] == "compute" else row["bytes"]
            limits[row["where"]["what"]] = amount / row["median_us"] * 1e6
    return limits


def share_of_limit(row: dict, limits: dict[str, float]) -> float | None:
    """Return the least time that the roofline allows over the measured time; None if unknown."""
    least = []
    for amount, what in ((row["flops"], "compute"), (row["bytes"], "memory")):
        if amount and limits[what]:
            least.append(amount / limits[what] * 1e6)
    return max(least) / row["median_us"] if least else None


def _line(row: dict, limits: dict[str, float]) -> str:
    ratio = f"{row['ratio']:.2f}" if row["ratio"] >= 0.995 else f"**{row['ratio']:.2f}**"
    sparse = "" if row["sparse"] is None else f"{row['sparse']:.2f}"
    share = share_of_limit(row, limits)
    limit = "" if share is None else f"{100 * share:.0f} %"
    span = f"{row['median_us']:.1f} ({row['low_us']:.1f} to {row['high_us']:.1f})"
    notes = [f"{row['flops'] / row['median_us'] / 1e6:.0f} TFLOP/s"] if row["flops"] else []
    notes += [f"{row['bytes'] / row['median_us'] / 1e6:.2f} TB/s"] if row["bytes"] else []
    notes += [row["note"]] if row["note"] else []
    cells = (row["case"], row["call"], span, ratio, sparse, limit, ", ".join(notes))
    return "| " + " | ".join(cells) + " |"
