"""Pruning runs: recipe -> train -> prune -> compress -> report."""
