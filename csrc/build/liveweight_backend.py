"""In-tree build backend: setuptools', with torch taken from the environment being installed into.

An isolated build would download a second torch (and, by default, its CUDA stack) only for headers.
Where the target environment already holds torch >= 2.11, its headers are used and nothing is
downloaded; where it does not, torch becomes an ordinary build requirement.
"""

from __future__ import annotations

import os
import pathlib
import sys
import sysconfig

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from setuptools import build_meta as _setuptools  # noqa: E402
from setuptools.build_meta import *  # noqa: E402, F403

# The cap lets pip choose a CPU wheel from a local folder over a newer CUDA one; at run time there
# is no cap, because the stable ABI holds for every later torch.
_TORCH = "torch>=2.11,<2.14"
_HEADER = pathlib.Path("torch/include/torch/csrc/stable/library.h")


def _target_torch() -> pathlib.Path | None:
    for key in ("platlib", "purelib"):
        site = pathlib.Path(sysconfig.get_path(key))
        if (site / _HEADER).exists():
            return site / "torch" / "include"
    return None


def _requirements(base: list[str]) -> list[str]:
    known = _target_torch() or os.environ.get("LIVEWEIGHT_TORCH_INCLUDE")
    return list(base) if known else [*base, _TORCH]


def _with_torch(build):
    def wrapped(*args, **kwargs):
        include = _target_torch()
        if include:
            os.environ.setdefault("LIVEWEIGHT_TORCH_INCLUDE", str(include))
        return build(*args, **kwargs)

    return wrapped


def get_requires_for_build_wheel(config_settings=None):
    return _requirements(_setuptools.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings=None):
    return _requirements(_setuptools.get_requires_for_build_editable(config_settings))


build_wheel = _with_torch(_setuptools.build_wheel)
build_editable = _with_torch(_setuptools.build_editable)
