"""The command line: liveweight prune | compress | bench | study | report | info | list."""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import warnings
from collections.abc import Sequence

_HELP = """\
liveweight VERB ...

  prune RECIPE          train, prune, retrain, compress, measure, report
  compress CHECKPOINT   choose kernels again, for this machine
  bench CHECKPOINT      time a compressed model against its dense twin
  study NAME            train a whole grid of nets that compares methods
  report RUN [RUN ...]  write the report of a run or study again, or one page of several runs
  info                  versions, CPU, GPU, and which kernels this installation has
  list WHAT             recipes, studies, importances, formats, models or ops

start here:
  liveweight prune lenet5-digits           LeNet-5 on 5,000 built-in digits, a few minutes
  liveweight prune lenet5-digits --prune.alpha.conv 0.8 --out runs/mine
  liveweight bench runs/lenet5-digits/checkpoint.safetensors
  liveweight VERB --help                   what a verb takes, with examples

exit codes: 0 done, 1 an error that is named in one line, 2 a command line that is not understood
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        from liveweight.runs.parse import UsageError

        raise UsageError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; return 0, 1 for an expected error, 2 for a wrong command line."""
    words = list(sys.argv[1:] if argv is None else argv)
    from liveweight.runs.parse import UsageError

    try:
        return _dispatch(words)
    except UsageError as error:
        return _fail(error, 2)
    except (ValueError, TypeError, OSError) as error:
        if os.environ.get("LIVEWEIGHT_TRACEBACK"):
            raise
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on from the last whole epoch", 130)
    except SystemExit as leave:  # --help and --print_config of the parsers
        return int(leave.code or 0)


def _fail(error: object, code: int) -> int:
    text = " ".join(str(error).split()) or type(error).__name__
    print(f"liveweight: error: {text}", file=sys.stderr)
    return code


def _dispatch(words: list[str]) -> int:
    from liveweight import __version__
    from liveweight._check import near_misses
    from liveweight.runs.parse import UsageError

    verbs = {
        "prune": _prune,
        "compress": _compress,
        "bench": _bench,
        "study": _study,
        "report": _report,
        "info": _info,
        "list": _list,
    }
    if not words or words[0] in ("-h", "--help", "help"):
        print(_HELP, end="")
        return 0 if words else 2
    if words[0] == "--version":
        print(f"liveweight {__version__}")
        return 0
    verb, *rest = words
    if verb not in verbs:
        raise UsageError(f"no verb {verb!r}: {near_misses(verb, verbs)}")
    return verbs[verb](rest) or 0


def _parser(verb: str, description: str, examples: str) -> _Parser:
    return _Parser(
        prog=f"liveweight {verb}",
        description=description,
        epilog="examples:\n" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _prune(words: list[str]) -> None:
    from liveweight.runs.parse import UsageError, make_parser, parse_recipe, run_path

    if not words or words[0].startswith("-"):
        if words and words[0] in ("-h", "--help"):
            make_parser().print_help()
            return
        raise UsageError("prune needs a RECIPE first (see liveweight list recipes)")
    recipe = parse_recipe(words[0], words[1:])

    from liveweight.runs.prune_run import execute

    # torch.compile and autograd warn about things a user of this command cannot change
    warnings.filterwarnings("ignore", module=r"torch\..*")
    execute(recipe, run_path(words[0], recipe))


def _checkpoint_arguments(parser: _Parser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a file that lw.save wrote")
    parser.add_argument(
        "--model",
        help="built-in name or package.module:factory; default: the recipe beside the checkpoint",
    )
    parser.add_argument(
        "--example",
        metavar="SHAPE",
        help="input shape with batch, such as 64x1x28x28; default: as in the run, batch 64",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")


def _compress(words: list[str]) -> None:
    parser = _parser(
        "compress",
        "Load a compressed or pruned checkpoint, choose its kernels again by measuring on this\n"
        "machine, and save it. Values do not change; no layer becomes slower than dense.",
        "  liveweight compress runs/mine/checkpoint.safetensors --example 8x1x28x28\n"
        "  liveweight compress net.safetensors --model my.nets:Net --example 1x3x224x224 "
        "--out fast.safetensors\n",
    )
    _checkpoint_arguments(parser)
    parser.add_argument("--out", help="file to write; default: CHECKPOINT itself")
    from liveweight.runs import checkpoints

    print(checkpoints.recompress(**vars(parser.parse_args(words))))


def _bench(words: list[str]) -> None:
    parser = _parser(
        "bench",
        "Time a compressed checkpoint against its dense twin and the torch.compile'd dense twin,\n"
        "in turns on the same input.",
        "  liveweight bench runs/mine/checkpoint.safetensors\n"
        "  liveweight bench net.safetensors --model my.nets:Net --example 1x3x224x224\n",
    )
    _checkpoint_arguments(parser)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    from liveweight.runs import checkpoints

    print(checkpoints.bench(**vars(parser.parse_args(words))))


def _study(words: list[str]) -> None:
    from liveweight.studies.command import study

    study(words)


def _report(words: list[str]) -> None:
    parser = _parser(
        "report",
        "Write report.md and the plots of a finished run again, from its result.json; the page of\n"
        "a study, from its rows; or one page over several runs: seeds of a recipe, or recipes.",
        "  liveweight report runs/lenet5-digits\n"
        "  liveweight report runs/comparison --page results/comparison\n"
        "  liveweight report runs/lenet5-mnist-0 runs/lenet5-mnist-1 --page results/lenet5\n"
        "  liveweight report results/lenet5      the same page again, from its own data\n"
        "  liveweight report results/lenet5 runs/lenet5-mnist-2 --page results/lenet5\n",
    )
    parser.add_argument("run", metavar="RUN", nargs="+", help="a folder of a run, study or page")
    parser.add_argument("--page", metavar="DIR", help="write the page into this folder")
    from liveweight.runs import collect
    from liveweight.runs.parse import UsageError
    from liveweight.studies.command import report

    arguments = parser.parse_args(words)
    runs, page = arguments.run, arguments.page
    if page is None and len(runs) > 1:
        raise UsageError("several runs make one page: say where with --page DIR")
    if len(runs) == 1 and (pathlib.Path(runs[0]) / "study.yaml").is_file():
        print(report(runs[0], page))
    elif page is not None or collect.is_page(runs[0]):
        collect.write_page(runs, page or runs[0])
    else:
        _report_run(runs[0])


def _report_run(run: str) -> None:
    from liveweight.runs.folder import RunFolder
    from liveweight.runs.parse import parse_recipe
    from liveweight.runs.report import write_report

    folder = RunFolder(run)
    result = folder.result()
    write_report(folder, parse_recipe(str(folder.path / "recipe.yaml")), result)


def _info(words: list[str]) -> None:
    parser = _parser(
        "info", "Versions, CPU, GPU, and who serves which op here.", "  liveweight info\n"
    )
    parser.parse_args(words)
    from liveweight._info import info

    print(info())


def _list(words: list[str]) -> None:
    from liveweight._check import near_misses
    from liveweight.runs.listing import LISTS as OF_RUNS
    from liveweight.runs.parse import UsageError
    from liveweight.studies.command import studies

    LISTS = {"recipes": OF_RUNS["recipes"], "studies": studies, **OF_RUNS}

    parser = _parser(
        "list",
        "What can be named in recipes and calls.",
        "".join(f"  liveweight list {name}\n" for name in LISTS),
    )
    parser.add_argument("what", metavar="WHAT", help=", ".join(LISTS))
    what = parser.parse_args(words).what
    if what not in LISTS:
        raise UsageError(f"cannot list {what!r}: {near_misses(what, LISTS)}")
    print(LISTS[what]())
