"""Who serves an op on a GPU: the kernel, or on an old one the reference, said once."""

from __future__ import annotations

import pytest
import torch

from liveweight import _library


class OnGpu(torch.Tensor):
    """A CPU tensor that says it lives on CUDA device 0."""

    def get_device(self) -> int:
        return 0


@pytest.fixture
def registered(monkeypatch):
    """Register a launcher that answers "kernel" for an op whose reference answers "reference"."""
    kernels = {}

    class Library:
        def impl(self, name, kernel, key):
            kernels[name, key] = kernel

    monkeypatch.setattr(_library, "lib", Library())
    monkeypatch.setattr(_library, "_served_by", {})
    monkeypatch.setitem(_library._references, "masked_linear", lambda *args: ("reference", args))
    _library.register_triton("masked_linear", lambda *args: ("kernel", args))
    return kernels["masked_linear", "CUDA"]


def test_recent_gpus_run_the_kernel(registered, monkeypatch, recwarn):
    x = torch.zeros(2).as_subclass(OnGpu)
    for capability in (80, 86, 90, 120):
        monkeypatch.setattr(_library, "capability", lambda index, c=capability: c)
        assert registered(x, 3, None)[0] == "kernel"
    assert not recwarn


def test_old_gpus_run_the_reference_and_hear_of_it_once(registered, monkeypatch):
    monkeypatch.setattr(_library, "capability", lambda index: 75)
    x = torch.zeros(2).as_subclass(OnGpu)
    with pytest.warns(UserWarning, match=r"masked_linear .* needs compute capability 8.0.* 7.5"):
        got = registered(x, 3, None)
    assert got[0] == "reference" and got[1][1:] == (3, None)
    with pytest.warns() as seen:
        import warnings

        warnings.warn("a sentinel", stacklevel=1)
        assert registered(x, 3, None)[0] == "reference"
    assert len(seen) == 1


@pytest.mark.gpu
def test_the_capability_of_this_gpu(gpu):
    major, minor = torch.cuda.get_device_capability(gpu)
    assert _library.capability(0) == 10 * major + minor
