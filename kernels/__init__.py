"""Triton kernels: leaves that import torch and triton only."""
