"""A training step under a fixed 90 % mask, dense and sparse; see training_step.py."""

from __future__ import annotations

import pytest
import torch
from training_step import NETS, both_steps


@pytest.mark.parametrize("which", ["dense", "sparse"])
@pytest.mark.parametrize("name", NETS)
def test_training_step(measure, name, which):
    with torch.inference_mode(False):  # which conftest.py sets for every benchmark
        measure(f"training step {name}, batch 128, 90%", both_steps(name, 128, 0.9)[which])
