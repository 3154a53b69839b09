"""The op namespace: every schema of the table, the compiled libraries, and who serves which op.

The torch dispatcher is the only switch. Each op has its plain PyTorch reference registered for all
devices; a compiled library or a Triton launcher, where present, takes its own device over.
"""

from __future__ import annotations

import functools
import importlib
import json
import pathlib
import warnings
from collections.abc import Callable
from types import ModuleType

import torch

from liveweight._schemas import SCHEMAS

NAMESPACE = "liveweight"
_HERE = pathlib.Path(__file__).parent

lib = torch.library.Library(NAMESPACE, "DEF")
for _name, _schema in SCHEMAS.items():
    lib.define(_name + " ".join(_schema.split()))

# Triton kernels use asynchronous copies and bfloat16 products, which older GPUs do not have.
OLDEST_GPU = 80

_served_by: dict[str, str] = {}  # op -> what serves it on CUDA, where no library of ours does
_references: dict[str, Callable] = {}


def _build_note(part: str) -> str:
    record = _HERE / "_build.json"
    if not record.exists():
        return "not built: this is a source tree without a build; run `make build`"
    note = json.loads(record.read_text()).get(part, "not built")
    return f"not built: {note}" if note != "built" else "built, but the file is gone"


def _load_ops(part: str) -> str:
    if part == "cuda" and torch.version.cuda is None:
        return "this torch has no CUDA"
    path = _HERE / f"_{part}.so"
    if not path.exists():
        return _build_note(part)
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error}"
    return "loaded"


def _load_pack() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("liveweight._pack"), "loaded"
    except ImportError as error:
        note = _build_note("pack")
        return None, note if note.startswith("not built") else f"does not load: {error}"


def _find_triton() -> str:
    try:
        return f"found {importlib.import_module('triton').__version__}"
    except ImportError as error:
        return f"not installed: {error}"


_status = {"cpu": _load_ops("cpu"), "cuda": _load_ops("cuda"), "triton": _find_triton()}
pack, _status["pack"] = _load_pack()


def status() -> dict[str, str]:
    """Return, for each of cpu, cuda, triton and pack, "loaded"/"found ..." or why it is missing."""
    return dict(_status)


def _warn_on_gpu(name: str, reference: Callable) -> Callable:
    """Say once per op that a GPU is being served by the slow reference, and why."""
    warned = False

    def kernel(*args, **kwargs):
        nonlocal warned
        if not warned and any(isinstance(a, torch.Tensor) and a.is_cuda for a in args):
            warned = True
            warnings.warn(
                f"liveweight.{name} runs its slow PyTorch reference on CUDA "
                f"(cuda: {_status['cuda']}; triton: {_status['triton']})",
                stacklevel=2,
            )
        return reference(*args, **kwargs)

    return kernel


def register(name: str, reference: Callable, fake: Callable) -> None:
    """Register an op's plain PyTorch kernel for every device, and its shape function."""
    _references[name] = reference
    lib.impl(name, _warn_on_gpu(name, reference), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=lib)


@functools.lru_cache
def capability(index: int) -> int:
    """Return the compute capability of a CUDA device, 80 for 8.0."""
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def register_triton(name: str, launch: Callable) -> None:
    """Register a Triton launcher as the CUDA kernel of an op that register() knows.

    GPUs that are too old for it get the op's reference, with one warning. The first argument of
    the op is a tensor.
    """
    warned, reference = False, _references[name]

    def kernel(first: torch.Tensor, *args):
        nonlocal warned
        found = capability(first.get_device())
        if found >= OLDEST_GPU:
            return launch(first, *args)
        if not warned:
            warned = True
            warnings.warn(
                f"liveweight.{name} runs its slow PyTorch reference: its kernel needs compute "
                f"capability {OLDEST_GPU / 10:.1f}, this GPU has {found / 10:.1f}",
                stacklevel=2,
            )
        return reference(first, *args)

    lib.impl(name, kernel, "CUDA")
    _served_by[name] = "triton"


def register_torch(name: str, launch: Callable) -> None:
    """Register what calls a library that PyTorch brings as the CUDA kernel of an op."""
    lib.impl(name, launch, "CUDA")
    _served_by[name] = "torch"


def _has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key)


def cpu_isa() -> str:
    """Return the instruction set the compiled CPU kernels run with: avx512, avx2 or plain."""
    return torch.ops.liveweight.cpu_isa() if _status["cpu"] == "loaded" else "none"


def backends() -> dict[str, dict[str, str]]:
    """Return op -> device -> who serves it.

    "c++ (isa)", "cuda c++", "triton", "torch" (a library that PyTorch brings) or "reference".
    """
    table = {}
    for name in SCHEMAS:
        cpu = f"c++ ({cpu_isa()})" if _has_kernel(name, "CPU") else "reference"
        cuda = "reference"
        if name in _served_by:
            cuda = _served_by[name]
        elif _has_kernel(name, "CUDA"):
            cuda = "cuda c++"
        table[name] = {"cpu": cpu, "cuda": cuda}
    return table
