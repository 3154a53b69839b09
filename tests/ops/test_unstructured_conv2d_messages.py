"""What unstructured_conv2d says about arguments that do not fit; how it guards memory."""

from __future__ import annotations

import pytest
import torch
from sparse_convs import Case, parts

from liveweight.formats import UnstructuredKernels
from liveweight.ops import unstructured_conv2d

OPS = torch.ops.liveweight


def bad_calls():
    x, weight, packed, bias = Case(size=(4, 5)).make()
    yield (x, weight, bias), {}, TypeError, "weight must be formats.UnstructuredKernels, got Tensor"
    yield ([1.0], packed, bias), {}, TypeError, "x must be a tensor, got list"
    yield (
        (x[:, :5], packed),
        {},
        ValueError,
        r"expected x \[B, 6, H, W\] or one sample, got \(3, 5,",
    )
    yield (
        (x[0, 0], packed),
        {},
        ValueError,
        r"expected x \[B, 6, H, W\] or one sample, got \(4, 5\)",
    )
    yield (x.double(), packed), {}, TypeError, "expected x float32 like values, got float64"
    yield (x, packed, bias[:4]), {}, ValueError, r"expected bias \[5\], got \(4,\)"
    yield (x, packed, bias.half()), {}, TypeError, "expected bias float32, got float16"
    yield (x, packed), {"stride": 0}, ValueError, "stride must be >= 1, got 0"
    yield (x, packed), {"padding": (1, -1)}, ValueError, r"padding must be >= 0, got \(1, -1\)"
    yield (x, packed), {"padding": "same"}, ValueError, "padding must be a whole number or two"
    yield (x, packed), {"dilation": (1, 1, 1)}, ValueError, "dilation must be a whole number or two"
    yield (x, packed), {"groups": 2}, ValueError, "5 filters do not form groups=2"
    yield (x, packed), {"groups": 0}, ValueError, "5 filters do not form groups=0"
    yield (x, packed), {"activation": "gelu"}, ValueError, "None or 'relu', got 'gelu'"
    yield (x, packed), {"pool": 0}, ValueError, "pool must be a whole number >= 1, got 0"
    yield (x, packed), {"layout": "nhwc"}, ValueError, "layout must be None or one of .*got 'nhwc'"
    yield (
        (x, packed),
        {"dilation": 2},
        ValueError,
        r"x of \(4, 5\) is too small for kernel \(3, 3\)",
    )
    yield (x, packed), {"pool": 3}, ValueError, r"pool 3: the convolution gives \(2, 3\)"


@pytest.mark.parametrize("number", range(len(list(bad_calls()))))
def test_messages(number):
    args, options, error, message = list(bad_calls())[number]
    with pytest.raises(error, match=message):
        unstructured_conv2d(*args, **options)


def test_launcher_guards_memory():
    case = Case(tile=(2, 3))
    x, _, packed, bias = case.make(1.0)
    names = ("columns", "segments", "offsets", "shape", "tile")
    index = dict(zip(names, parts(packed), strict=True))

    def call(x=x, values=packed.values, bias=bias, settings=case.settings, pool=1, layout=0, **new):
        weight = (index | new).values()
        return OPS.unstructured_conv2d(x, values, *weight, bias, *settings, False, pool, layout)

    def refuses(message, **new):
        with pytest.raises(RuntimeError, match=message):
            call(**new)

    refuses("expected 6 channels, got 4", x=x[:, :4])
    refuses("expected x .* float32", x=x.double())
    refuses("offsets must rise", offsets=packed.offsets.flip(0))
    refuses("expected 7 offsets, got 6", offsets=packed.offsets[:6])
    refuses("expected 270 values, got 269", values=packed.values[:269])
    refuses("columns has the wrong dtype", columns=packed.columns.int())
    refuses("bad tile", tile=(300, 3))
    refuses(r"expected bias \[5\]", bias=bias[:4])
    refuses("is smaller than the kernel", x=x[:, :, :1], settings=((1, 1), (0, 0), (1, 1), 1))
    refuses("stride must be two numbers >= 1", settings=((0, 1), *case.settings[1:]))
    refuses("do not form 4 groups", settings=(*case.settings[:3], 4))
    refuses("cannot pool 9 x 11 by 10", pool=10)
    refuses("layout must be", layout=3)
    # Any byte may stand in the index: the numbers are wrong then, but no foreign memory is touched.
    for name in ("columns", "segments"):
        assert call(**{name: torch.full_like(index[name], 255)}).shape == (3, 5, 9, 11)
    wide = UnstructuredKernels.from_dense(torch.randn(5, 1, 17, 17))
    weight = (wide.values, wide.columns + 1, *parts(wide)[1:])
    with pytest.raises(RuntimeError, match="columns or segments leave their tile"):
        OPS.unstructured_conv2d(
            torch.randn(1, 1, 20, 20), *weight, None, [1, 1], [0, 0], [1, 1], 1, False, 1, 0
        )
