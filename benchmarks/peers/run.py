"""Other engines on the same nets, in turns with ours: DeepSparse, onnxruntime, OpenVINO.

    python benchmarks/peers/run.py                   about 10 minutes; installs 650 MB once

Makes an environment of its own from requirements.txt (Python 3.8 to 3.11 for DeepSparse, see
--python), starts one worker process per engine there, and lets them and this process take turns:
one computes while the others wait. Writes peers.json beside the CPU suite's results; rebuild the
page with `PYTHONPATH=benchmarks python -m cpu --page-only`. DeepSparse's licence allows evaluation
only; of the engines nothing but these figures is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import nets  # noqa: E402
import recipe  # noqa: E402
import torch  # noqa: E402
from cpu.__main__ import OUT, machine  # noqa: E402
from cpu.baselines import freeze  # noqa: E402
from cpu.conv_cases import LAYERS, POINTWISE, pruned  # noqa: E402
from cpu.net_cases import agree, compress  # noqa: E402
from cpu.peers import FILE  # noqa: E402
from cpu.timing import no_collector, order  # noqa: E402
from shapes import pruned_linear  # noqa: E402
from torch import nn  # noqa: E402

ENGINES = ("deepsparse", "onnxruntime", "openvino")
CONVS = LAYERS | POINTWISE
# Layers alone: name, what was removed, batch.
SINGLE = [
    ("4096x4096", "weight", 1), ("4096x4096", "weight", 32), ("1024x1024", "weight", 128),
    ("64@32x32", "kernel", 1), ("64@32x32", "kernel", 32), ("256@14x14 1x1", "weight", 8),
    ("256@8x8", "kernel", 1), ("256@8x8", "kernel", 32),
    ("256@8x8", "weight", 1), ("256@8x8", "weight", 32),
]  # fmt: skip
SLOT_S = 0.1  # long against the caches that the last engine left cold
CASE_S = 15.0  # a case ends after so long, with at least five rounds


def environment(folder: pathlib.Path, base: str) -> pathlib.Path:
    """Return the python of the peers' environment, made where it is missing."""
    python, done = folder / "bin" / "python", folder / ".installed"
    wanted = (HERE / "requirements.txt").read_text()
    if not done.exists() or done.read_text() != wanted:
        subprocess.run([base, "-m", "venv", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        subprocess.run([*pip, "-r", str(HERE / "requirements.txt")], check=True)
        done.write_text(wanted)
    return python


class Engine:
    """A worker process that holds one net; it sleeps while others compute."""

    def __init__(self, name: str, python: pathlib.Path) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [str(python), str(HERE / "worker.py")], stdin=subprocess.PIPE, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**os.environ, "NM_DISABLE_ANALYTICS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        )  # fmt: skip

    def ask(self, **what) -> dict:
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"failed": "the worker ended"}

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def cases(quick: bool) -> list[tuple[dict, object]]:
    """Return labels and a function that builds the net, for every case."""
    wanted = [("VGG-like", "kernel"), ("VGG-like", "weight"), ("encoder", "weight")]
    wanted += [("ResNet-20", "kernel")]
    out = []
    for name, granularity in wanted[:1] if quick else wanted:
        for batch in nets.NETS[name].batches:
            for threads in (1,) if quick or name == "ResNet-20" else (1, 2):
                labels = {"net": name, "granularity": granularity, "sparsity": 0.9}
                labels |= {"batch": batch, "threads": threads}
                out.append((labels, _net(name, granularity, batch)))
    for layer, granularity, batch in SINGLE[-2:] if quick else SINGLE:
        labels = {"layer": layer, "granularity": granularity, "sparsity": 0.9}
        out.append((labels | {"batch": batch, "threads": 1}, _layer(layer, granularity, batch)))
    return out


def _net(name: str, granularity: str, batch: int):
    return lambda: (nets.make(name, 0.9, granularity), nets.example(name, batch))


def _layer(name: str, granularity: str, batch: int):
    """Return what builds one layer alone: a Linear "NxK", or a convolution of the suite."""

    def build():
        if name in CONVS:
            inp, out, side, kernel, padding = CONVS[name]
            layer = nn.Conv2d(inp, out, kernel, padding=padding)
            layer.weight.data = pruned(CONVS[name], 0.9, granularity == "kernel")
            x = torch.randn(batch, inp, side, side)
        else:
            out, inp = (int(size) for size in name.split("x"))
            layer = nn.Linear(inp, out)
            layer.weight.data = pruned_linear(out, inp, 0.9)
            x = torch.randn(batch, inp)
        return nn.Sequential(layer).eval().requires_grad_(False), x

    return build


def ours(model: nn.Module, x: torch.Tensor) -> dict:
    """Return our calls: compressed, dense eager and, where it works, dense compiled."""
    sparse, _, _ = compress(model, x)
    calls = {"liveweight": lambda: sparse(x), "eager": lambda: model(x)}
    torch._dynamo.reset()
    with torch.inference_mode():
        agree("compressed", sparse(x), model(x))
        try:
            compiled = freeze(model)
            agree("compiled", compiled(x), model(x))
            calls["torch.compile"] = lambda: compiled(x)
        except torch._dynamo.exc.TorchDynamoException as error:
            print(f"torch.compile does not work here: {type(error).__name__}")
    return calls


def slot(call) -> float:
    """Return microseconds per call over one turn of at least SLOT_S."""
    import worker

    return worker.timed(call, SLOT_S)["us"]


def one_case(labels: dict, build, engines: list[Engine], folder: pathlib.Path, rounds: int) -> dict:
    """Return the row of one case: medians of the paired ratios of every engine over ours."""
    torch.set_num_threads(labels["threads"])
    model, x = build()
    recipe.write(model, x, folder)
    row: dict = {**labels, "versions": {}, "failed": {}}
    turns = {name: (lambda c=call: slot(c)) for name, call in ours(model, x).items()}
    for engine in engines:
        answer = engine.ask(load=str(folder), engine=engine.name, cores=labels["threads"])
        if "failed" not in answer and answer["error"] > 1e-3:
            answer = {"failed": f"wrong result, relative error {answer['error']:.1e}"}
        if "failed" in answer:
            row["failed"][engine.name] = answer["failed"]
            continue
        row["versions"][engine.name] = answer["version"]
        turns[engine.name] = lambda e=engine: e.ask(run=SLOT_S)["us"]
    samples: dict[str, list[float]] = {name: [] for name in turns}
    with torch.inference_mode(), no_collector():
        start, index = time.monotonic(), 0
        while index < 5 or (index < rounds and time.monotonic() - start < CASE_S):
            for name in order(list(turns), index):
                samples[name].append(turns[name]())
            index += 1
    mine = samples["liveweight"]
    row["us"] = {name: statistics.median(values) for name, values in samples.items()}
    row["fastest_us"] = {name: min(values) for name, values in samples.items()}
    for name, values in samples.items():
        if name != "liveweight":
            pairs = zip(values, mine, strict=True)
            row[name] = statistics.median(theirs / own for theirs, own in pairs)
    row["dense"] = min(row[n] for n in samples if n not in ("liveweight", "deepsparse"))
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--venv", type=pathlib.Path, default=HERE.parents[1] / ".cache" / "peers")
    parser.add_argument("--python", default=sys.executable, help="Python 3.8 to 3.11")
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="fewer cases")
    options = parser.parse_args()
    python = environment(options.venv, options.python)
    engines = [Engine(name, python) for name in ENGINES]
    result: dict = {"machine": machine(), "rows": [], "problems": []}
    try:
        for labels, build in cases(options.quick):
            with tempfile.TemporaryDirectory() as folder:
                try:
                    place = pathlib.Path(folder)
                    row = one_case(labels, build, engines, place, options.rounds)
                except Exception as error:  # one case must not cost the others
                    result["problems"].append(f"{labels}: {type(error).__name__}: {error}")
                    continue
            result["rows"].append(row)
            print(labels, {n: round(v) for n, v in row["us"].items()}, row["failed"], flush=True)
    finally:
        for engine in engines:
            engine.close()
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / FILE).write_text(json.dumps(result, indent=1) + "\n")
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
