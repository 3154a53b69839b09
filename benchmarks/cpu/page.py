"""The results as a markdown page: verdicts first, then every table with what it means."""

from __future__ import annotations

from collections.abc import Callable

from cpu import peers, targets
from cpu.tables import TABLES, Table
from cpu.timing import geometric_mean

AGAINST = {
    "torch": "torch call",
    "dense": "strongest dense",
    "sparse": "best sparse baseline",
    "peak": "FMA peak",
    "deepsparse": "DeepSparse",
    "two_cores": "one core",
    "room": "limit / bytes",
}
VERDICTS = {
    "goal": "goal reached",
    "floor": "reached",
    "missed": "**missed**",
    "not measured": "not measured",
}
HOW = """\
Times are wall-clock medians in one process: the calls of a cell take turns, in an order that is
reversed every round, and every ratio is the **median of the ratios within a round**, so that a
disturbance hits both sides. fp32, random values. Every result was compared with float64 before it
was timed (relative Frobenius error below 1e-5; whole nets: with dense eager, below 1e-4). *Warm*: a
turn repeats its call for 2 ms. *Cold*: one call after 128 MB of other memory were rewritten (that
empties L1 and L2; a larger L3 may keep some weights).

A ratio is the other side's time over ours; **below 1 we lose, and the figure is bold**. *torch
call*: `F.linear` or `F.conv2d` as written. *Strongest dense*: the fastest of that, channels_last,
weights pre-packed for oneDNN and for MKL, and `torch.compile` with freezing (single layers: where a
cell lists it; whole nets: always). *Best sparse baseline*: the fastest of
`torch.mm(csr, x.t().contiguous())`, `F.linear(x, csr)`, torch BSR, SciPy CSR and, for convolutions,
im2col with a CSR weight; their output stays transposed, which spares them a copy that ours
includes; "-" where one call of theirs would take seconds. *Share*: useful
operations (2 x kept weights x outputs each adds to) over the multiply-add peak measured in the same
run. All times are in the JSON files beside this page."""

WHY = """\
Why some targets are missed, as far as measuring could tell on an AVX-512 Xeon (243 GF/s a core):

* **One load for every multiply-add.** Where single weights are missing, a weight meets one row of
  inputs, which comes from the first-level cache. The rate of reads there (see below) bounds such
  loops at about half of the multiply-add peak; the loop of `unstructured_linear` alone reaches 95
  to 105 GF/s, that of 1x1 convolutions 100. Blocks and whole kernels use a loaded row several
  times and pass 45 % where the operands are near. The dense libraries reach 60 to 90 % of the
  peak here.
* **Short rows.** At 90 % and 95 % a row keeps 26 and 13 weights of a tile of 256 columns; loading
  and storing its sums costs as much as ten more. That decides the matrices of the collection
  (DLMC) and 300x784.
* **Turning inputs and outputs**, so that samples lie side by side, takes 10 to 25 % of a small
  layer, and 0.25 ms of the 1.2 ms of a 4096x4096 layer of blocks at 95 % with cold caches.
* **Calls.** An op costs 5 to 10 us before it computes, a layer of PyTorch 3: visible in ResNet-20
  and LeNet-300-100 at batch 1.
* **What is not ours**: attention, normalisation and GELU of Transformers. "rest" in the table of
  whole networks is the time without any of the layers that were replaced, "at most" the speed-up
  if those ran at the full multiply-add peak."""


def number(value: float | None) -> str:
    """Return a ratio in two or three digits; bold where it is a loss."""
    if value is None:
        return "-"
    text = f"{value:.2f}" if value < 9.95 else f"{value:.1f}"
    return f"**{text}**" if value < 0.995 else text


def markdown_table(head: list[str], rows: list[list[str]], left: int = 1) -> str:
    """Return a table whose first `left` columns are set left and the others right."""
    rule = [":--" if i < left else "--:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *rows])


def _unique(rows: list[dict], key: str) -> list:
    return list(dict.fromkeys(row.get(key) for row in rows))


def ratios(table: Table, rows: list[dict]) -> str:
    """Return torch / dense / sparse and the share of the peak, over columns of sparsities."""
    columns = sorted(_unique(rows, table.columns))
    lines = list(dict.fromkeys(tuple(row[k] for k in table.lines) for row in rows))
    found = {(tuple(r[k] for k in table.lines), r[table.columns]): r for r in rows}
    head = [*table.lines, *(f"{100 * c:.0f} %" for c in columns)]
    body = []
    for line in lines:
        cells = [found.get((line, column)) for column in columns]
        body.append([*map(str, line), *(_ratio_cell(row) for row in cells)])
    note = "Cells: x torch call / x strongest dense / x best sparse baseline (share of the peak)."
    text = note + "\n\n" + markdown_table(head, body, len(table.lines))
    return text + _other_layouts(table, rows)


def _other_layouts(table: Table, rows: list[dict]) -> str:
    """Return how fast ours is where the activations already lie in another layout."""
    names = list(dict.fromkeys(n for r in rows for n in r["ratios"] if n.startswith("ours, ")))
    if not names:
        return ""
    found = [row for row in rows if names[0] in row["ratios"]]
    body = [
        [*(str(row[k]) for k in table.lines), f"{100 * row[table.columns]:.0f} %",
         *(number(row["dense"] / row["ratios"][n]) for n in names)]
        for row in found
    ]  # fmt: skip
    head = [*table.lines, "removed", *(name.removeprefix("ours, ") for name in names)]
    note = "x strongest dense where input and output already lie in another layout, ours alone:"
    return f"\n\n{note}\n\n" + markdown_table(head, body, len(table.lines))


def _ratio_cell(row: dict | None) -> str:
    if row is None:
        return ""
    text = " / ".join(number(row[k]) for k in ("torch", "dense", "sparse"))
    return text + (f" ({100 * row['peak']:.0f} %)" if row.get("peak") else "")


def as_list(table: Table, rows: list[dict]) -> str:
    """Return one line per row: labels, our time, and every other call's ratio."""
    skip = {"us", "ratios", "torch", "dense", "sparse", "gflops", "peak", "rounds", "error"}
    labels = [k for k in rows[0] if k not in skip | {"busy", "threads", "cold"}]
    names = list(dict.fromkeys(n for row in rows for n in row["ratios"]))
    head = [*labels, "us", *(f"x {n}" for n in names)]
    body = [
        [*(str(row[k]) for k in labels), f"{row['us']['liveweight']:.1f}",
         *(number(row["ratios"].get(n)) for n in names)]
        for row in rows
    ]  # fmt: skip
    return markdown_table(head, body, len(labels))


def roofline(table: Table, rows: list[dict]) -> str:
    head = ["threads", "fp32 multiply-add, GF/s", "read L1, GB/s", "L2", "L3", "DRAM"]
    body = [
        [str(row["threads"]), *(f"{row[k]:.0f}" for k in ("gflops", "L1", "L2", "L3", "DRAM"))]
        for row in rows
    ]
    return markdown_table(head, body)


def memory(table: Table, rows: list[dict]) -> str:
    head = ["format", "shape", "density", "bytes per weight", "6 d + 5 %", "dense over it"]
    body = [
        [row["format"], row["shape"], f"{row['density']:.2f}", f"{row['bytes']:.3f}",
         f"{row['limit']:.3f}", number(row["smaller"])]
        for row in rows
    ]  # fmt: skip
    return markdown_table(head, body, 2)


def nets(table: Table, rows: list[dict]) -> str:
    head = ["net", "removed", "threads", "batch", "eager ms", "compiled ms", "ours ms",
            "rest ms", "x eager", "x best dense", "at most", "choosing, s",
            "layers changed"]  # fmt: skip
    body = []
    place = {net: i for i, net in enumerate(dict.fromkeys(row["net"] for row in rows))}
    keys = ("granularity", "threads", "batch", "sparsity")
    for row in sorted(rows, key=lambda r: (place[r["net"]], *(r[k] for k in keys))):
        us, what = row["us"], "kernels" if row["granularity"] == "kernel" else "weights"
        ms = [us.get("eager"), us.get("torch.compile"), us["liveweight"], row.get("rest")]
        body.append(
            [row["net"], f"{100 * row['sparsity']:.0f} % {what}", str(row["threads"]),
             str(row["batch"]), *("-" if v is None else f"{v / 1e3:.3g}" for v in ms),
             number(row["torch"]), number(row["dense"]), number(row.get("limit")),
             f"{row['compress_s']:.1f}",
             f"{row['changed']} of {row['layers']}"]
        )  # fmt: skip
    ours = [r for r in rows if "torch.compile of ours" in r["us"]]
    text = markdown_table(head, body, 2)
    scaling = [f"{r['net']}, {r['granularity']}s {number(r['two_cores'])}" for r in rows
               if "two_cores" in r and r["sparsity"] == 0.9]  # fmt: skip
    if scaling:
        text += (
            "\n\nTwo cores against one at the largest batch, 90 % removed, each net compressed for "
        )
        text += f"its number of threads and timed in turns: {'; '.join(scaling)}."
    if ours:
        mean = geometric_mean(1 / r["ratios"]["torch.compile of ours"] for r in ours)
        text += f"\n\n`torch.compile` of the compressed net works on {len(ours)} of those tried"
        text += f" and runs at {mean:.2f} of its speed without (geometric mean)."
    for why in dict.fromkeys(r.get("compiled ours", "works") for r in rows):
        text += "" if why == "works" else f"\n\n`torch.compile` of a compressed net: {why}"
    return text


FORMS: dict[str, Callable[[Table, list[dict]], str]] = {
    "ratios": ratios, "list": as_list, "roofline": roofline, "memory": memory, "nets": nets,
}  # fmt: skip


def verdicts(tables: dict[str, list[dict]]) -> str:
    """Return every target beside what was measured, and how many were reached."""
    judged = [targets.judge(target, tables) for target in targets.all_targets()]
    body = []
    for v in judged:
        t = v.target
        unit = " %" if t.unit == "%" else ""
        values = [v.measured, t.floor, t.goal]
        shown = ["-" if x is None else f"{x:.3g}{unit}" for x in values]
        where = f"worst of {v.rows}: {v.worst}" if v.rows > 1 and v.worst else ""
        body.append([t.case, AGAINST[t.column], *shown, VERDICTS[v.words], where])
    count = {w: sum(v.words == w for v in judged) for w in VERDICTS}
    measured = len(judged) - count["not measured"]
    line = (
        f"{measured} of {len(judged)} targets were measured: {count['goal']} reach their goal, "
        f"{count['floor']} their floor, {count['missed']} are missed."
    )
    head = ["case", "against", "measured", "floor", "goal", "verdict", "what decided"]
    return line + "\n\n" + markdown_table(head, body, 2)


def page(results: dict, others: dict | None = None, plots: dict[str, str] | None = None) -> str:
    """Return the page. results: table -> its JSON; others: the peers'; plots: file -> text."""
    rows = targets.derived({name: result["rows"] for name, result in results.items()})
    rows["peers"] = others["rows"] if others else []
    machine = next(iter(results.values()))["machine"] if results else {}
    parts = ["# CPU benchmarks", "Written by `make bench-cpu`; do not edit."]
    parts.append("\n".join(f"* {key}: {value}" for key, value in machine.items()))
    commits = {r["machine"].get("commit") for r in results.values()}
    if len(commits) > 1:
        parts.append("The tables are not all of one commit; each JSON file names its own.")
    parts += ["## How it is measured", HOW, "## Targets", verdicts(rows), WHY]
    parts += [f"![{text}]({file})" for file, text in (plots or {}).items()]
    for name, table in TABLES.items():
        parts += [f"## {table.title}", table.meaning]
        result = results.get(name)
        if result is None:
            parts.append("Not run.")
            continue
        if result["rows"]:
            parts.append(FORMS[table.form](table, result["rows"]))
        parts += [f"Not complete: {text}" for text in result["problems"]]
        busy = sum(bool(row.get("busy")) for row in result["rows"])
        if busy:
            parts.append(f"{busy} of {len(result['rows'])} cells were disturbed by other programs.")
        in_use = result.get("cores_in_use_by_others", 0)
        if in_use > 0.15:
            parts.append(f"Other programs kept {in_use:.1f} cores busy when this table began.")
        parts.append(f"`{name}.json`, {result['seconds']:.0f} s.")
    parts.append(peers.section(others))
    return "\n\n".join(parts) + "\n"
