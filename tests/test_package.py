"""The package as users get it: what is in it, and that it works without its compiled part."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch

import liveweight as lw

ROOT = pathlib.Path(__file__).resolve().parents[1]
SRC = ROOT / "src" / "liveweight"

tomllib = pytest.importorskip("tomllib")


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_folder_is_listed():
    listed = set(project()["tool"]["setuptools"]["packages"])
    found = {"liveweight", "liveweight.kernels"}
    folders = (p.parent.relative_to(SRC) for p in SRC.glob("*/**/__init__.py"))
    found |= {".".join(("liveweight", *folder.parts)) for folder in folders}
    assert listed == found


def test_package_data_exists():
    for pattern in project()["tool"]["setuptools"]["package-data"]["liveweight.runs"]:
        assert list((SRC / "runs").glob(pattern)), pattern
    assert (SRC / "py.typed").exists()


def test_version_is_told_once():
    assert lw.__version__ == project()["project"]["version"]


def test_public_interface_is_complete():
    verbs = "score prune_ keep_masks strip_ recalibrate_bn_ shrink_ compress_ save load benchmark"
    for name in [*verbs.split(), "masks", "info"]:
        assert callable(getattr(lw, name)), name
    ops = "activity_stats_ mass_mask unstructured_linear masked_linear kernelwise_conv2d"
    for name in ops.split():
        assert callable(getattr(lw.ops, name)), name
    assert lw.nn.SparseLinear.from_dense and lw.nn.SparseConv2d.from_dense
    assert set(lw.__all__) <= set(dir(lw))


def test_info_names_every_op_and_every_part():
    text = str(lw.info())
    for op in lw.info().backends:
        assert op in text
    for part in ("cpu", "cuda", "triton", "pack"):
        assert f"part: {part}" in text
    assert torch.__version__ in text


WHOLE_PATH = """
import torch, liveweight as lw
assert lw.info().parts["cpu"].startswith("not built"), lw.info().parts
assert {b["cpu"] for b in lw.info().backends.values()} == {"reference"}
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(12, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
x = torch.randn(16, 12)
lw.prune_(net, [x], importance="nnrelief", alpha=0.7)
lw.strip_(net)
expected = net(x)
net[0] = lw.nn.SparseLinear.from_dense(net[0])
torch.testing.assert_close(net(x), expected)
net(x).sum().backward()
print("reference path works:", lw.info().parts["cpu"])
"""


def test_works_without_the_compiled_part(tmp_path: pathlib.Path):
    skip = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    shutil.copytree(SRC, tmp_path / "liveweight", ignore=skip)
    shutil.copytree(ROOT / "kernels", tmp_path / "liveweight" / "kernels", ignore=skip)
    done = subprocess.run(
        [sys.executable, "-c", WHOLE_PATH],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "not built: this is a source tree without a build" in done.stdout


def test_a_missing_compiler_is_a_reason_not_an_error(tmp_path: pathlib.Path):
    code = (
        "import sys, pathlib; sys.path.insert(0, 'csrc/build'); import compile_native as c;"
        f"print(c._run('cpu', pathlib.Path({str(tmp_path)!r}), pathlib.Path({str(tmp_path)!r})))"
    )
    env = {k: v for k, v in os.environ.items() if k != "CXX"} | {"PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler found" in done.stdout


def test_import_needs_no_optional_package():
    code = (
        "import sys\n"
        "for name in ('matplotlib', 'triton', 'jsonargparse', 'rich', 'safetensors', 'yaml'):\n"
        "    sys.modules[name] = None\n"
        "import liveweight as lw\n"
        "print(lw.info().parts['triton'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "not installed" in done.stdout
