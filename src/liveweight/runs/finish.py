"""The end of a run: choose on validation, compress, save, measure; only then open the test set."""

from __future__ import annotations

import datetime
import os
from typing import TYPE_CHECKING

import torch
from torch import nn

from liveweight import compress, prune
from liveweight._info import info
from liveweight.runs.fast import FastModel, make_fast
from liveweight.runs.latency import measure_latency
from liveweight.runs.recipe import PruneRecipe
from liveweight.runs.report import write_report
from liveweight.runs.train import batches, evaluate

if TYPE_CHECKING:
    from liveweight.runs.prune_run import PruningRun


def choose_iterate(recipe: PruneRecipe, rows: list[dict]) -> tuple[int, str]:
    """Return (index, reason) of the iterate to keep; rows[0] is dense, only validation counts.

    smallest: fewest weights among those within tolerance points of dense validation accuracy;
    best: highest validation accuracy among the pruned, fewest weights at a tie; last, which is
    also the one that a target asks for.
    """
    pruned = range(1, len(rows))
    if not pruned:
        return 0, "nothing was pruned"
    if recipe.goal is not None:
        return len(rows) - 1, "the recipe prunes to a target"
    if recipe.keep == "last":
        return len(rows) - 1, "the recipe keeps the last"

    def accuracy(i: int) -> float:
        return rows[i]["validation_accuracy"]

    best = max(pruned, key=lambda i: (accuracy(i), -rows[i]["kept"]))
    if recipe.keep == "best":
        return best, "highest validation accuracy among the pruned"
    floor = accuracy(0) - recipe.tolerance / 100
    margin = f"{recipe.tolerance:g} point{'' if recipe.tolerance == 1 else 's'}"
    inside = [i for i in pruned if accuracy(i) >= floor - 1e-9]
    if not inside:
        return best, (f"none is within {margin} of dense validation accuracy; this one loses least")
    smallest = min(inside, key=lambda i: (rows[i]["kept"], -accuracy(i)))
    return smallest, (f"fewest weights within {margin} of dense validation accuracy")


def finish(run: PruningRun) -> None:
    """Choose, compress, save, measure, evaluate on test once, and write the report."""
    say, folder, recipe = run.reporter.say, run.folder, run.recipe
    count = folder.iterates_done()
    rows = [folder.load_tensors(f"iterates/{i:02d}")[1] for i in range(count)]
    folder.cut_log(rows[-1]["log_bytes"])
    chosen, reason = choose_iterate(recipe.prune, rows)
    kept, total = rows[chosen]["kept"], rows[chosen]["total"]
    say(f"keep iteration {chosen}: {reason} ({kept:,} of {total:,} weights)")

    dense, _ = run.load(0)
    dense.eval()
    folder.save_tensors("dense", dense.state_dict(), {"model": recipe.to_dict()["model"]})
    model, _ = run.load(chosen)
    notes = settle_(run, model) + precision_notes(run)
    if recipe.prune.goal is not None and chosen:
        notes.append(f"Target: {rows[chosen]['pruned']['target']['summary']}.")
    pruned_validation, _ = evaluate(model, run.data.validation)

    say("compress: measuring candidates on this machine")
    inputs = example_inputs(run, recipe.compress.batch_sizes)
    fast = make_fast(model.eval(), inputs, recipe.compress)
    compress.save(fast.model, folder.path / "checkpoint.safetensors")

    say("measure latency")
    inputs = example_inputs(run, recipe.report.batch_sizes)
    others = {} if fast.shrink_report is None else {"shrunk, dense kernels": fast.shrunk}
    others["compressed"] = fast.model
    latency, latency_notes = measure_latency(dense, others, inputs, recipe.report.torch_compile)
    notes += fast.notes + latency_notes
    validation = evaluate(fast.model, run.data.validation)[0]
    result = {
        "machine": machine_facts(run.device),
        "data": {name: len(getattr(run.data, name)) for name in ("train", "validation", "test")},
        "input_shape": list(run.data.validation.inputs.shape[1:]),
        "iterates": rows,
        "chosen": chosen,
        "reason": reason,
        "validation": {"pruned": pruned_validation, "compressed": validation},
        "compress": fast.to_dict(),
        "latency": latency,
        "files": file_sizes(folder.path),
        "budget": run.budget,
        "notes": notes,
    }
    # Everything is decided and on disk; from here on the test set is only reported.
    result["test"] = test_accuracies(run, dense, fast, rows)
    folder.log(event="finish", chosen=chosen, test_accuracy=result["test"])
    write_report(folder, run.asked, result, say)


def precision_notes(run: PruningRun) -> list[str]:
    """Return a note where training computed in another type than the final models do."""
    types = {run.autocast(i) for i in range(run.recipe.prune.iterations + 1)} - {None}
    return [
        f"Trained and validated with autocast to {str(kind).removeprefix('torch.')}, weights in "
        "float32; the dense and the compressed model are tested and timed in float32."
        for kind in types
    ]


def settle_(run: PruningRun, model: nn.Module) -> list[str]:
    """Make the zeros permanent and recalibrate BatchNorm where that helps; return notes.

    Retraining has renewed its statistics already, on augmented images: plain averages over the
    training set can serve worse. Validation decides, and a tie goes to the statistics that are
    there.
    """
    prune.strip_(model)
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        return []
    trained = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    before, _ = evaluate(model, run.data.validation)
    prune.recalibrate_bn_(model, [x for x, _ in batches(run.data.train, 250)])
    after, _ = evaluate(model, run.data.validation)
    figures = f"validation {100 * after:.2f} % with plain averages over the training set, "
    figures += f"{100 * before:.2f} % with those of the training"
    if after > before:
        return [f"BatchNorm statistics were recalibrated: {figures}."]
    for name, buffer in model.named_buffers():
        buffer.copy_(trained[name])
    return [f"BatchNorm statistics are those of the training: {figures}."]


def example_inputs(run: PruningRun, sizes: list[int]) -> dict[int, torch.Tensor]:
    """Return batch size -> real validation inputs, repeated where there are too few."""
    x = run.data.validation.inputs
    biggest = max(sizes)
    x = x.repeat(-(-biggest // len(x)), *[1] * (x.dim() - 1))
    return {size: x[:size].contiguous() for size in sizes}


def test_accuracies(
    run: PruningRun, dense: nn.Module, fast: FastModel, rows: list[dict]
) -> dict[str, float]:
    """Return test accuracies: dense and compressed in float32; each iterate's, for information.

    Iterates are evaluated in the type they were trained in.
    """
    test = run.data.test
    found = {
        "dense": evaluate(dense, test)[0],
        "compressed": evaluate(fast.model, test)[0],
    }
    for row in rows:
        iteration = row["iteration"]
        row["test_accuracy"] = evaluate(run.load(iteration)[0], test, run.autocast(iteration))[0]
    return found


def machine_facts(device: torch.device) -> dict[str, str]:
    """Return date, versions and hardware: what a measured figure needs beside it."""
    facts = info()
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        **facts.versions,
        **facts.cpu,
        "threads": str(torch.get_num_threads()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "logical cores": str(os.cpu_count()),
    }


def file_sizes(folder) -> dict[str, int]:
    """Return bytes of the dense and the compressed file."""
    return {n: (folder / n).stat().st_size for n in ("dense.safetensors", "checkpoint.safetensors")}
