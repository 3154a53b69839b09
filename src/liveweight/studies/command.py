"""`liveweight study`, and what `list` and `report` say of studies."""

from __future__ import annotations

import pathlib

import jsonargparse

from liveweight._check import near_misses
from liveweight.runs.listing import columns
from liveweight.runs.parse import (
    Formatter,
    UsageError,
    add_options,
    check_options,
    gather_lists,
)
from liveweight.runs.progress import Reporter
from liveweight.runs.recipe import build
from liveweight.studies import STUDIES
from liveweight.studies.grid import Cell, Study, StudyFolder, export, run_study, write_page

_MORE = ("out", "part", "only")
_EPILOG = """examples:
  liveweight list studies
  liveweight study comparison --data.path MNIST_FOLDER --out runs/comparison
  liveweight study comparison --data.path MNIST_FOLDER --out runs/comparison     goes on
  liveweight study comparison --out runs/comparison --part 0/2      one of two processes
  liveweight report runs/comparison --page results/comparison
"""


def study(words: list[str]) -> None:
    """Run the study that words[0] names. UsageError: unknown study or option."""
    if words and words[0] in ("-h", "--help"):
        print("usage: liveweight study NAME [--KEY VALUE ...]\n")
        print(studies())
        print(f"\n{_EPILOG}", end="")
        return
    if not words or words[0] not in STUDIES:
        name = words[0] if words else ""
        raise UsageError(f"no study {name!r}: {near_misses(name, STUDIES)}")
    chosen, overrides = STUDIES[words[0]], words[1:]
    check_options(overrides, chosen.options, _MORE)
    try:
        words = gather_lists(overrides, chosen.options)
        parsed = _parser(chosen).parse_args(words).as_dict()
    except jsonargparse.ArgumentError as error:
        raise UsageError(" ".join(str(error).split())) from None
    parsed.pop("config", None)
    out, part, only = (parsed.pop(key) for key in _MORE)
    run_study(
        chosen,
        build(parsed, chosen.options),
        out or pathlib.Path("runs") / chosen.name,
        part=_part(part),
        only=_only(only or []),
        reporter=Reporter(),
    )


def _parser(chosen: Study) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        prog=f"liveweight study {chosen.name}",
        description=f"{chosen.title}. Computes the cells that are missing in the folder.",
        epilog=_EPILOG,
        formatter_class=Formatter,
        exit_on_error=False,
    )
    parser.add_argument("--out", help=f"folder of the study; default: runs/{chosen.name}")
    parser.add_argument("--part", default="0/1", help="i/n: every n-th cell from i on")
    parser.add_argument("--only", nargs="*", help="KEY=VALUE: only such cells")
    add_options(parser, chosen.options)
    return parser


def _part(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit()):
        raise UsageError(f"--part must be i/n such as 0/2, got {text!r}")
    return int(index), int(count)


def _only(words: list[str]):
    pairs = [word.partition("=") for word in words]
    if bad := [key for key, found, _ in pairs if not found]:
        raise UsageError(f"--only takes KEY=VALUE, got {bad[0]!r}")

    def fits(cell: Cell) -> bool:
        if unknown := [key for key, _, _ in pairs if key not in cell]:
            raise UsageError(f"--only {unknown[0]}: {near_misses(unknown[0], cell)}")
        return all(str(cell[key]) == value for key, _, value in pairs)

    return fits


def report(path: str, page: str | None) -> str:
    """Write the page of a study again, and into the folder `page` where one is given."""
    folder = StudyFolder(path)
    chosen = STUDIES[folder.facts()["study"]]
    if page is None:
        write_page(chosen, folder)
    else:
        folder = export(chosen, folder, page)
    return f"page: {folder.path / 'README.md'}"


def studies() -> str:
    """Return the list of studies."""
    rows = [(name, chosen.title) for name, chosen in STUDIES.items()]
    return columns(("study", "what it compares"), rows)
