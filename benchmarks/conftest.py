"""Set-up shared by the microbenchmarks: inference mode, threads, machine facts in the JSON."""

from __future__ import annotations

import pathlib
import sys

import pytest
import torch

import liveweight as lw

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # for shapes.py under importlib mode


def pytest_addoption(parser):
    parser.addoption("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")


@pytest.fixture(autouse=True)
def _inference(request):
    torch.set_num_threads(request.config.getoption("--threads"))
    with torch.inference_mode():
        yield


@pytest.fixture
def measure(benchmark, request):
    """Time call(), after checking it against expected where one is given."""

    def run(group: str, call, expected=None, tolerance: float = 1e-3):
        if expected is not None:
            error = (call() - expected).norm() / expected.norm().clamp_min(1e-30)
            assert error < tolerance, f"wrong result: relative error {error:.2e}"
        benchmark.group = group
        benchmark.extra_info["threads"] = torch.get_num_threads()
        benchmark(call)

    return run


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["liveweight"] = str(lw.info())


def pytest_configure(config):
    parts = lw.info().parts
    if parts["cpu"] != "loaded":
        raise pytest.UsageError(f"the compiled CPU kernels are missing: {parts['cpu']}")
