"""Training must not slow down on numbers too small to matter."""

from __future__ import annotations

import torch

from liveweight.runs.prune_run import denormals_flushed


def test_denormals_are_flushed_inside_and_kept_outside():
    tiny = torch.full((4,), 1e-39)
    with denormals_flushed():
        assert not (tiny * 1.0).any()
    assert (tiny * 1.0).all()


def test_denormals_are_kept_again_after_an_error():
    tiny = torch.full((4,), 1e-39)
    try:
        with denormals_flushed():
            raise KeyError
    except KeyError:
        assert (tiny * 1.0).all()
