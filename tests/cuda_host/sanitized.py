"""Run the tests marked `sanitized` on CUDA C++ ops built with AddressSanitizer and UBSan.

    python tests/cuda_host/sanitized.py            # all of tests/csrc
    python tests/cuda_host/sanitized.py FILE ...

An access outside a tensor or outside shared memory, a misaligned one, or an overflow of a signed
number ends the run with a report. csrc/build/sanitize.py does the same for the CPU kernels.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "csrc" / "build"))

import sanitize  # noqa: E402


def environment() -> dict[str, str]:
    """Build the sanitized library; return the environment in which Python can load it."""
    env = {
        **os.environ,
        "LIVEWEIGHT_SANITIZE": os.environ.get("LIVEWEIGHT_SANITIZE", sanitize.DEFAULT),
        # Python never gives back what it allocates at its start.
        "ASAN_OPTIONS": "detect_leaks=0:" + os.environ.get("ASAN_OPTIONS", ""),
        "UBSAN_OPTIONS": "print_stacktrace=1:" + os.environ.get("UBSAN_OPTIONS", ""),
    }
    # Before the preload: the compiler has no use for it.
    build = [sys.executable, "-c", "import emulated; emulated.build()"]
    subprocess.run(build, env=env, cwd=HERE, check=True)
    return {**env, "LD_PRELOAD": sanitize.runtimes()}


def main(tests: list[str]) -> int:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["-m", "sanitized and not gpu", *(tests or ["tests/csrc"])]
    return subprocess.run(command, env=environment(), cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
