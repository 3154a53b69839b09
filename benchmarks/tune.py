"""Time the candidate tiles of the Triton kernels on the GPU at hand and rewrite their table.

    python benchmarks/tune.py                        # every op
    python benchmarks/tune.py --op masked_linear     # one, or several; "block_linear/64" is one op
    python benchmarks/tune.py --dry-run              # print the difference and write nothing

Every row of the table for this architecture keeps its place (dtype, product, kept share) and gets
the fastest tile of kernels/tile_candidates.py at it, if that is MARGIN faster than the present one.
An architecture without rows of its own takes those that serve it as a start. A tile whose result is
wrong is never taken, and makes the exit status 1; one that does not compile or fit is passed over.
Candidates are compiled beforehand by JOBS processes, which leave them in Triton's cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import difflib
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator

import torch
import triton
from gpu_timing import Timing, time_in_turns
from tune_problems import Problem, build

from liveweight.kernels import tile_table
from liveweight.kernels.launch import arch_of
from liveweight.kernels.tile_candidates import candidates
from liveweight.kernels.tiles import Tile, section_of

ROOT = pathlib.Path(__file__).resolve().parents[1]
TABLE = ROOT / "kernels" / "tile_table.py"
MARGIN = 1.02  # a new tile must be faster by this factor
FINALISTS = 4  # of the first, short timing, which a longer one decides between
SHORT, LONG = 5, 40  # rounds
TOLERANCE = {2: 1e-2, 4: 1e-5}  # relative error by bytes of an operand
JOBS = min(os.cpu_count() or 1, 16)

Row = tuple[int, tuple[int, int, int], float, tuple]
Timer = Callable[[dict, int, int], dict[object, Timing]]


@dataclasses.dataclass
class Outcome:
    """What became of one row: its tile afterwards, what was said, and whether any was wrong."""

    tile: tuple
    notes: list[str]
    wrong: bool = False


def fields(tile: Tile) -> tuple:
    """Return a tile as the table writes it: without defaults at its end."""
    values = list(dataclasses.astuple(tile))
    if not tile.tma:
        values.pop()
        if tile.split == 1:
            values.pop()
    return tuple(values)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.double().norm().clamp_min(1e-30))


def usable(problem: Problem, tiles: list[Tile], tolerance: float) -> tuple[list[Tile], list[str]]:
    """Return the tiles whose result is right, and a line for each that is not."""
    right, wrong = [], []
    for tile in tiles:
        try:
            error = relative_error(problem.run(tile, 0), problem.want)
        except triton.TritonError:  # does not compile, or asks more than the GPU has
            continue
        if error <= tolerance:  # NaN is wrong, too
            right.append(tile)
        else:
            wrong.append(f"WRONG {tile}: relative error {error:.1e} > {tolerance:.0e}")
    return right, wrong


def choose(problem: Problem, row: Row, tiles: list[Tile], timer: Timer) -> Outcome:
    """Time the tiles of one row against the present one."""
    present = Tile(*row[3])
    right, notes = usable(problem, list(dict.fromkeys([present, *tiles])), TOLERANCE[row[0]])
    outcome = Outcome(row[3], notes, bool(notes))
    if not right:
        notes.append("no tile works")
        return outcome

    def calls(of: list[Tile]) -> dict:
        return {t: lambda i, t=t: problem.run(t, i) for t in of}

    short = timer(calls(right), problem.sets, SHORT)
    finalists = sorted(right, key=lambda tile: short[tile].median_us)[:FINALISTS]
    if present in right:
        finalists = list(dict.fromkeys([present, *finalists]))
    long = timer(calls(finalists), problem.sets, LONG)
    best = min(finalists, key=lambda tile: long[tile].median_us)
    before, after = long.get(present), long[best].median_us
    if before is None:
        notes.append(f"{after:.1f} us, the present tile does not work")
    else:
        notes.append(f"{before.median_us:.1f} -> {after:.1f} us of {len(right)} tiles")
    if before is None or before.median_us >= MARGIN * after:
        outcome.tile = fields(best)
    return outcome


def rows_of(table: dict, op: str, arch: int) -> list[Row]:
    return table[op].get(arch) or table[op][section_of(op, arch)]


def tune(
    table: dict, ops: list[str], arch: int, timer: Timer, make: Callable[..., Problem]
) -> tuple[dict, bool]:
    """Return the table with the rows of ops for arch timed anew, and whether a result was wrong."""
    table, wrong = {op: dict(sections) for op, sections in table.items()}, False
    for op in ops:
        rows = []
        for row in rows_of(table, op, arch):
            item_bytes, shape, density, _ = row
            problem = make(op, item_bytes, shape, density)
            tiles = candidates(op, shape, density, item_bytes, arch)
            outcome = choose(problem, row, tiles, timer)
            rows.append((item_bytes, shape, density, outcome.tile))
            wrong |= outcome.wrong
            place = f"{op} {item_bytes} bytes {shape} {density}"
            print(f"{place}: {row[3]} -> {outcome.tile}: {'; '.join(outcome.notes)}", flush=True)
            del problem  # its memory is the next one's
        table[op][arch] = rows
    return table, wrong


def render(source: str, table: dict, measured: dict[str, dict[int, str]]) -> str:
    """Return the text of tile_table.py with other contents under the same docstring."""
    head = source[: source.index("MEASURED:")]
    lines = ["MEASURED: dict[str, dict[int, str]] = {"]
    for op, sections in measured.items():
        lines.append(f'    "{op}": {{')
        lines += [f'        {arch}: "{sections[arch]}",' for arch in sorted(sections)]
        lines.append("    },")
    lines = [*lines, "}"] if measured else [lines[0] + "}"]
    lines += ["", "TABLE: dict[str, dict[int, list[tuple]]] = {"]
    for op, sections in table.items():
        lines.append(f'    "{op}": {{')
        for arch in sorted(sections):
            lines += [f"        {arch}: [", *(f"            {row!r}," for row in sections[arch])]
            lines.append("        ],")
        lines.append("    },")
    return head + "\n".join([*lines, "}  # fmt: skip", ""])


def difference(before: str, after: str) -> str:
    pair = (before.splitlines(keepends=True), after.splitlines(keepends=True))
    return "".join(difflib.unified_diff(*pair, "tile_table.py", "tile_table.py (tuned)", n=1))


def cases(ops: list[str], arch: int) -> Iterator[tuple[str, Row, Tile]]:
    for op in ops:
        for row in rows_of(tile_table.TABLE, op, arch):
            for tile in candidates(op, row[1], row[2], row[0], arch):
                yield op, row, tile


def compile_part(ops: list[str], arch: int, part: int, jobs: int) -> None:
    """Launch every jobs-th row's candidates once, which leaves their code in Triton's cache."""
    last = None
    for number, (op, row, tile) in enumerate(cases(ops, arch)):
        if number % jobs != part:
            continue
        if last is None or last[0] != (op, row):
            last = (op, row), build(op, *row[:3], l2_bytes=0)
        usable(last[1], [tile], TOLERANCE[row[0]])


def compile_all(ops: list[str], jobs: int) -> None:
    command = [sys.executable, __file__, "--jobs", str(jobs)]
    command += [part for op in ops for part in ("--op", op)]
    running = [subprocess.Popen([*command, "--part", str(i)]) for i in range(jobs)]
    if sum(process.wait() != 0 for process in running):  # all are waited for
        raise SystemExit("tune: a compiling process failed; it said why above")


def main(argv: list[str] | None = None, path: pathlib.Path = TABLE) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--op", action="append", choices=sorted(tile_table.TABLE), metavar="OP")
    parser.add_argument("--dry-run", action="store_true", help="print the difference only")
    parser.add_argument("--jobs", type=int, default=JOBS, help="processes that compile")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("tiles are timed on a GPU, and torch finds none here")
    arch = arch_of(torch.empty(0, device="cuda"))
    ops = options.op or list(tile_table.TABLE)
    if options.part is not None:
        compile_part(ops, arch, options.part, options.jobs)
        return 0
    compile_all(ops, options.jobs)
    return retune(path, ops, arch, options.dry_run, time_in_turns, build)


def retune(
    path: pathlib.Path,
    ops: list[str],
    arch: int,
    dry_run: bool,
    timer: Timer,
    make: Callable[..., Problem],
) -> int:
    """Tune, print what changes in the file, write it unless dry_run; 1 if a result was wrong."""
    before = path.read_text()
    table, wrong = tune(tile_table.TABLE, ops, arch, timer, make)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    text = f"{name}, Triton {triton.__version__}, {datetime.date.today().isoformat()}"
    known = tile_table.MEASURED
    measured = {op: {**known.get(op, {}), **({arch: text} if op in ops else {})} for op in table}
    after = render(before, table, {op: texts for op, texts in measured.items() if texts})
    print(difference(before, after), end="")
    if not dry_run:
        path.write_text(after)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
