"""Ops on sequences that a table reads from a grid, each with a definition and fast backends."""

from vssm.kernels import flops  # noqa: F401  (registers the formulas)
from vssm.kernels.backends import available_backends, use_backend, why_not
from vssm.kernels.conv1d import causal_conv1d
from vssm.kernels.scan2d import scan2d
from vssm.kernels.selective_scan import selective_scan

__all__ = ["available_backends", "causal_conv1d", "scan2d", "selective_scan", "use_backend", "why_not"]
