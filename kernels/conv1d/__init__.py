"""The causal depthwise convolution of Mamba along any scan order."""

# The op stands in a module of its own: importing the backend ``torch.py`` binds the name ``torch`` in this package.
from vssm.kernels.conv1d.op import causal_conv1d

__all__ = ["causal_conv1d"]
