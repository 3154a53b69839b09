"""Compile liveweight's shared objects with ninja: ``python csrc/build/compile_native.py``.

Returns, for each of cpu, cuda and pack, "built" or the reason why it was not. A reason is never an
error here: without a compiler the package still works through its PyTorch reference kernels, and
``liveweight.info()`` repeats the reason.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import ninja_plan  # noqa: E402


def _ninja() -> list[str]:
    try:
        import ninja

        return [str(pathlib.Path(ninja.BIN_DIR) / "ninja")]
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise ninja_plan.Missing("ninja not found: pip install ninja") from None
        return [found]


def _run(part: str, build_dir: pathlib.Path, out_dir: pathlib.Path) -> str:
    plan = ninja_plan.Plan(build_dir / f"plan_{part}", out_dir)
    try:
        if part == "pack":
            plan.add_pack()
        elif part == "cpu":
            plan.add_cpu(ninja_plan.torch_include())
        else:
            tool = ninja_plan.nvcc()
            if tool is None:
                return "nvcc not found at build time (set CUDA_HOME)"
            plan.add_cuda(ninja_plan.torch_include(), tool)
        path = plan.write()
        done = subprocess.run(
            [*_ninja(), "-f", str(path)],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    except ninja_plan.Missing as missing:
        return str(missing)
    print(done.stdout, file=sys.stderr)
    return "built" if done.returncode == 0 else f"compilation failed:\n{done.stdout[-4000:]}"


def compile_all(
    out_dir: pathlib.Path,
    build_dir: pathlib.Path = ninja_plan.ROOT / "build",
    parts: tuple[str, ...] = ("cpu", "pack", "cuda"),
) -> dict[str, str]:
    """Build every part that this machine can build; put the results and ``_build.json`` there."""
    lib = build_dir / "lib"
    lib.mkdir(parents=True, exist_ok=True)
    status = {part: _run(part, build_dir, lib) for part in parts}
    (lib / "_build.json").write_text(json.dumps(status, indent=1))
    out_dir.mkdir(parents=True, exist_ok=True)
    for built in lib.iterdir():
        # Replaced, not overwritten: a process that has the old library mapped keeps it intact.
        temporary = out_dir / (built.name + ".new")
        shutil.copy2(built, temporary)
        temporary.replace(out_dir / built.name)
    return status


if __name__ == "__main__":
    result = compile_all(ninja_plan.ROOT / "src" / "liveweight")
    for name, what in result.items():
        print(f"{name:5} {what}")
    sys.exit(any(what.startswith("compilation failed") for what in result.values()))
