"""What the fixture `kernels` gives to a test: the CUDA C++ ops, on the emulator or on a GPU."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator

import emulated
import probes
import pytest
import torch

from liveweight import _library

_BARRIER = re.compile(r"\b(?:__sync(?:threads|warp)|cp_async_wait<[^>]*>)\(")


class Kernels:
    """The ops of csrc/cuda on tensors of `device`.

        def test_it(kernels):
            x = torch.randn(3, 5, 1).to(kernels.device)
            for _ in kernels.orders():
                kernels.op("activity_stats_")(stats, x, 0.0)

    device    torch.device("cpu") for the emulator, the CUDA device otherwise
    emulated  whether this is the emulator
    """

    def __init__(self, name: str):
        self.emulated = name == "emulated"
        self.device = torch.device("cpu" if self.emulated else "cuda")
        if self.emulated:
            self._library = emulated.load()
            self._library.set_order("forward")

    def op(self, name: str) -> Callable:
        """Return op `name`, which takes tensors of `device`; its launcher is the one of the .cu."""
        space = torch.ops.liveweight_emulated if self.emulated else torch.ops.liveweight
        return getattr(space, name)

    def probe(self, name: str) -> Callable:
        """Return a kernel that exists for the tests alone (probes_*.cu)."""
        if not self.emulated:
            probes.load()
        return getattr(torch.ops.liveweight_probes, name)

    def orders(self, seed: int = 0) -> Iterator[str]:
        """Set the order of threads and blocks to forward, reverse and random in turn.

        Yields the name of the order; forward again afterwards. A GPU has its own: one pass. Under
        the sanitizers, which look for other things, random alone.
        """
        if not self.emulated:
            yield "gpu"
            return
        try:
            for order in ["random"] if emulated.sanitizers() else emulated.ORDERS:
                self._library.set_order(order, seed)
                yield order
        finally:
            self._library.set_order("forward")

    @contextlib.contextmanager
    def drop_barrier(self, file: str, line: int) -> Iterator[None]:
        """Ignore __syncthreads(), __syncwarp() or cp_async_wait of this line of csrc/cuda/file."""
        if not self.emulated:
            pytest.skip("barriers are dropped by the emulator alone")
        with self._library.drop_barrier(file, line):
            yield

    def barriers(self, *files: str) -> list[tuple[str, int]]:
        """Return file and line of every barrier in these files of csrc/cuda or tests/cuda_host."""
        found = []
        for file in files:
            path = emulated.CSRC / file
            source = (path if path.exists() else emulated.HERE / file).read_text()
            for number, text in enumerate(source.splitlines(), 1):
                if _BARRIER.search(text.split("//")[0]):
                    found.append((file, number))
        return found

    def assert_every_barrier_is_needed(self, check: Callable[[], None], *files: str) -> None:
        """Drop each barrier of these files in turn; each time, check() must fail in some order.

        check    calls ops and asserts their values; small inputs that meet every barrier
        """
        if not self.emulated:
            pytest.skip("barriers are dropped by the emulator alone")
        written = self.barriers(*files)
        assert written, f"no barrier in {files}"
        for _ in self.orders():
            check()
        met = set(self._library.barriers())
        for place in written:
            assert place in met, f"no test meets the barrier of {place[0]}, line {place[1]}"
            with self.drop_barrier(*place):
                noticed = any(_fails(check) for _ in self.orders(seed=3))
            assert noticed, f"{place[0]}: nothing notices the loss of line {place[1]}'s barrier"


def _fails(check: Callable[[], None]) -> bool:
    try:
        check()
    except (AssertionError, RuntimeError):  # wrong numbers, or what the emulator complains of
        return True
    return False


def make(name: str) -> Kernels:
    """Return the kernels of "emulated" or "gpu"; skips the test where this machine has none."""
    if name == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        if _library.status()["cuda"] != "loaded":
            pytest.skip(f"cuda: {_library.status()['cuda']}")
    elif not emulated.available():
        pytest.skip("no g++: the emulator of CUDA C++ cannot be compiled")
    return Kernels(name)
