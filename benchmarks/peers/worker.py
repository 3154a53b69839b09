"""Runs one engine in the peers' environment; obeys JSON lines on stdin, answers on stdout.

{"load": folder, "engine": name, "cores": n} -> {"version": ..., "error": relative error of y}
{"run": seconds} -> {"us": microseconds per call over at least one call}
Knows nothing of torch or of this project: recipe.json and weights.npz become an ONNX file here.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
import time

import numpy

OPSET = 13


def onnx_file(folder: pathlib.Path) -> str:
    """Return the path of the ONNX file of a recipe, written where it is missing."""
    target = folder / "net.onnx"
    if target.exists():
        return str(target)
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    about = json.loads((folder / "recipe.json").read_text())
    arrays = numpy.load(folder / "weights.npz")
    nodes = [
        helper.make_node(n["op"], n["inputs"], [n["output"]], **n["attributes"])
        for n in about["nodes"]
    ]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, about[shape])
        for name, shape in (("x", "input"), (about["result"], "output"))
    ]
    constants = [numpy_helper.from_array(arrays[name], name) for name in arrays.files]
    graph = helper.make_graph(nodes, "net", values[:1], values[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    model.ir_version = 8
    onnx.checker.check_model(model)
    onnx.save(model, str(target))
    return str(target)


def deepsparse(path: str, x, cores: int):
    import deepsparse

    engine = deepsparse.compile_model(path, batch_size=x.shape[0], num_cores=cores)
    return deepsparse.__version__, lambda: engine.run([x], val_inp=False)[0]


def onnxruntime(path: str, x, cores: int):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = cores, 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return onnxruntime.__version__, lambda: session.run(None, {"x": x})[0]


def openvino(path: str, x, cores: int):
    import openvino

    settings = {"INFERENCE_NUM_THREADS": cores, "INFERENCE_PRECISION_HINT": "f32"}
    settings |= {"PERFORMANCE_HINT": "LATENCY"}
    model = openvino.Core().compile_model(path, "CPU", settings)
    request = model.create_infer_request()
    return openvino.__version__, lambda: next(iter(request.infer({"x": x}).values()))


ENGINES = {"deepsparse": deepsparse, "onnxruntime": onnxruntime, "openvino": openvino}


def load(order: dict):
    folder = pathlib.Path(order["load"])
    x, y = numpy.load(folder / "x.npy"), numpy.load(folder / "y.npy").astype(numpy.float64)
    version, call = ENGINES[order["engine"]](onnx_file(folder), x, order["cores"])
    error = numpy.linalg.norm(call().astype(numpy.float64) - y) / numpy.linalg.norm(y)
    return call, {"version": version, "error": float(error)}


def timed(call, seconds: float) -> dict:
    """Time calls for so long, after a third of it in which caches fill, untimed."""
    start, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - start < seconds / 3:
        call()
        count += 1
    start, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - start < seconds:
        call()
        count += 1
    return {"us": (time.perf_counter() - start) / count * 1e6}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")  # engines print banners on stdout: those go to stderr
    os.dup2(2, 1)
    call = None
    for line in sys.stdin:
        order = json.loads(line)
        try:
            if "load" in order:
                call, answer = load(order)
            else:
                answer = timed(call, order["run"])
        except Exception as error:  # an engine that cannot run a net is a result too
            answer = {"failed": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
