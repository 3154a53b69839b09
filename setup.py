"""Builds the compiled part (see csrc/build/ninja_plan.py); everything else is in pyproject.toml.

A machine without a compiler gets a working package that runs its PyTorch reference kernels, and
one warning that says so.
"""

import pathlib
import sys
import warnings

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "csrc" / "build"))

from compile_native import compile_all  # noqa: E402


class Build(build_ext):
    """Hands the work to ninja: parallel, incremental, one object per file and instruction set."""

    def run(self):
        in_place = self.editable_mode or self.inplace
        package = HERE / "src" if in_place else pathlib.Path(self.build_lib)
        status = compile_all(package / "liveweight")
        if status["cpu"] != "built":
            warnings.warn(
                "liveweight was installed WITHOUT its compiled kernels; it works, but runs the "
                f"slow PyTorch reference implementation. Reason: {status['cpu']}",
                stacklevel=1,
            )

    def get_outputs(self):
        return []


setup(
    ext_modules=[Extension("liveweight._native", sources=[])],
    cmdclass={"build_ext": Build},
)
