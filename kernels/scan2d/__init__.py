"""The two-dimensional selective scan of Mamba2D: a state that comes from above and from the left."""

# The op stands in a module of its own: importing the backend ``torch.py`` binds the name ``torch`` in this package.
from vssm.kernels.scan2d.op import scan2d

__all__ = ["scan2d"]
