"""Run tests on kernels built with AddressSanitizer and UBSan: python csrc/build/sanitize.py TESTS.

Builds _cpu.so and _pack with LIVEWEIGHT_SANITIZE (default "address,undefined") into
build/sanitize/package, beside links to the package's Python files, and runs pytest with the
arguments given (default: tests/ops tests/csrc/test_pack.py) on that. Any report ends the run with
an error. The normal build stays untouched. Tests of torch.compile are left out: they check no
memory of ours and would run a compiler under the sanitizer.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import compile_native  # noqa: E402
import ninja_plan  # noqa: E402

DEFAULT = "address,undefined"
TESTS = ["tests/ops", "tests/csrc/test_pack.py"]
SUFFIXES = (".so", ".new")


def link_package(package: pathlib.Path) -> None:
    """Fill package with links to everything of src/liveweight but its compiled files."""
    if package.exists():
        shutil.rmtree(package)
    package.mkdir(parents=True)
    for entry in (ninja_plan.ROOT / "src" / "liveweight").iterdir():
        if not entry.name.endswith(SUFFIXES) and entry.name not in ("_build.json", "__pycache__"):
            (package / entry.name).symlink_to(entry)
    kernels = package / "kernels"
    if not kernels.exists():
        kernels.symlink_to(ninja_plan.ROOT / "kernels")


def runtimes() -> str:
    """Return the libraries that must be loaded before everything else, for LD_PRELOAD.

    libstdc++ is among them because the sanitizer looks up its __cxa_throw when it starts.
    """
    cxx = ninja_plan.compiler().split()
    found = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so.6"):
        path = subprocess.check_output([*cxx, f"-print-file-name={name}"], text=True).strip()
        if path == name:
            raise SystemExit(f"{name} not found: {cxx[0]} came without sanitizers")
        found.append(path)
    return " ".join(found)


def main(tests: list[str]) -> int:
    os.environ.setdefault("LIVEWEIGHT_SANITIZE", DEFAULT)
    root = ninja_plan.ROOT / "build" / "sanitize"
    package = root / "package" / "liveweight"
    link_package(package)
    status = compile_native.compile_all(package, root, parts=("cpu", "pack"))
    if any(what != "built" for what in status.values()):
        raise SystemExit(f"the sanitized build failed: {status}")
    env = {
        **os.environ,
        "LD_PRELOAD": runtimes(),
        "PYTHONPATH": str(package.parent),
        "PYTHONMALLOC": "malloc",  # small Python objects get red zones too
        "ASAN_OPTIONS": "detect_leaks=0:" + os.environ.get("ASAN_OPTIONS", ""),
        "UBSAN_OPTIONS": "print_stacktrace=1:" + os.environ.get("UBSAN_OPTIONS", ""),
    }
    check = "import liveweight._library as l; print('tested:', l.__file__, l.status())"
    subprocess.run([sys.executable, "-c", check], env=env, check=True)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    return subprocess.run([*command, "-k", "not compile", *(tests or TESTS)], env=env).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
