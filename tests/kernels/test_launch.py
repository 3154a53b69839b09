"""How float32 products are taken, however PyTorch was told."""

from __future__ import annotations

import pytest
import torch

launch = pytest.importorskip("liveweight.kernels.launch", reason="triton is not installed")


@pytest.fixture(autouse=True)
def restored():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    yield
    matmul.fp32_precision = "ieee"  # what a precision of "highest" reads as
    torch.set_float32_matmul_precision("highest")
    if before == "none":
        matmul.fp32_precision = before


@pytest.mark.parametrize(
    ("setting", "wanted"), [("highest", "tf32x3"), ("high", "tf32"), ("medium", "tf32")]
)
def test_the_older_setting_is_followed(setting, wanted):
    torch.set_float32_matmul_precision(setting)
    assert launch.precision(torch.float32) == wanted


@pytest.mark.parametrize(("setting", "wanted"), [("ieee", "tf32x3"), ("tf32", "tf32")])
def test_the_newer_setting_is_followed(setting, wanted):
    torch.backends.cuda.matmul.fp32_precision = setting
    assert launch.precision(torch.float32) == wanted
    assert launch.precision(torch.bfloat16) == "tf32"  # whatever it says, nothing is lost


@pytest.mark.parametrize(("setting", "wanted"), [("ieee", "tf32x3"), ("tf32", "tf32")])
def test_convolutions_follow_their_own_setting(setting, wanted):
    torch.backends.cudnn.conv.fp32_precision = setting
    assert launch.conv_precision(torch.float32) == wanted
    assert launch.conv_precision(torch.float16) == "tf32"


def test_division_rounds_up():
    assert [launch.cdiv(a, 4) for a in (0, 1, 4, 5)] == [0, 1, 1, 2]
