"""GPU kernels of ``vssm.layers.norm``: a layer's, not an op's, so that it has no definition here."""
