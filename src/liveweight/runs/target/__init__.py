"""Pruning to a target: from what a model may cost to the sparsity that does it."""
