"""The arrows of the house: cli -> studies -> runs -> compress, prune -> nn -> ops -> leaves."""

from __future__ import annotations

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SRC = ROOT / "src" / "liveweight"

LEAVES = {"_library", "_check", "kernels"}
LOW = LEAVES | {"_packing", "_graph", "formats", "reference"}
# room -> the rooms it may import; every room may import itself.
ALLOWED: dict[str, set[str]] = {
    "_schemas": set(),
    "_library": {"_schemas"},
    "_check": set(),
    "_graph": {"_check"},
    "_packing": {"_library", "_check"},
    "reference": {"_check", "formats"},
    "formats": {"_check", "_packing", "_library"},
    "ops": LOW,
    "nn": LOW | {"ops"},
    "prune": LOW | {"ops", "nn"},
    "compress": LOW | {"ops", "nn"},
    "_info": {"_library"},
    "runs": LOW | {"ops", "nn", "prune", "compress", "_info"},
    "studies": LOW | {"ops", "nn", "prune", "compress", "runs", "_info"},
    "cli": LOW | {"ops", "nn", "prune", "compress", "runs", "studies", "_info"},
    "__main__": {"cli"},
}


def room_of(path: pathlib.Path) -> str:
    first = path.relative_to(SRC).parts[0].removesuffix(".py")
    return "_graph" if first.startswith("_graph_") else first


def imported_rooms(path: pathlib.Path, src: pathlib.Path = SRC) -> set[str]:
    """Rooms of the package that a file imports, wherever in the file the import stands."""
    rooms: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                package = ["liveweight", *path.relative_to(src).parts[:-1]]
                base = ".".join(package[: len(package) - node.level + 1])
                module = f"{base}.{node.module}" if node.module else base
            else:
                module = node.module or ""
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        for name in names:
            parts = name.split(".")
            if parts[0] == "liveweight" and len(parts) > 1:
                rooms.add(parts[1])
    return rooms & (set(ALLOWED) | {"kernels"})


SOURCES = sorted(p for p in SRC.rglob("*.py") if p.name != "__init__.py" or p.parent != SRC)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(SRC)))
def test_imports_run_down(path: pathlib.Path):
    room = room_of(path)
    assert room in ALLOWED, f"{room} is not a room of the house; give it a place in ALLOWED"
    upward = imported_rooms(path) - ALLOWED[room] - {room}
    assert not upward, f"{room} must not import {sorted(upward)}"


def test_the_check_sees_an_upward_arrow(tmp_path: pathlib.Path):
    (tmp_path / "formats").mkdir()
    bad = tmp_path / "formats" / "bad.py"
    bad.write_text("def late():\n    from ..nn import SparseLinear\n    import liveweight.prune\n")
    assert imported_rooms(bad, src=tmp_path) - ALLOWED["formats"] == {"nn", "prune"}


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda p: p.name)
def test_triton_leaves_do_not_name_the_package(path: pathlib.Path):
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            roots = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            roots = {node.module.split(".")[0]}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1, f"{path.name} imports from above its folder"
            continue
        else:
            continue
        assert roots <= allowed, f"{path.name} imports {roots - allowed}"


def test_triton_is_imported_by_the_leaves_alone():
    for path in SRC.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                module = getattr(node, "module", None) or node.names[0].name
                assert not module.startswith("triton"), f"{path} imports triton"


@pytest.mark.parametrize(
    "path",
    sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".cpp", ".h", ".cu", ".cuh"}),
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_compiled_leaves_include_nothing_of_python_packages(path: pathlib.Path):
    text = path.read_text()
    assert "torch/extension.h" not in text, "slow to compile and bound to one torch version"
    if path.suffix == ".cuh" and path.name != "torch_ops.cuh":  # what launchers share
        assert "#include <torch" not in text, "device code must not see torch headers"
        assert '#include "torch_ops.cuh"' not in text, "device code must not see torch headers"
