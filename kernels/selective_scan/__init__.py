"""The selective scan of Mamba along any scan order."""

# The op stands in a module of its own: importing the backend ``torch.py`` binds the name ``torch`` in this package.
from vssm.kernels.selective_scan.op import selective_scan

__all__ = ["selective_scan"]
