"""GPU kernels of ``vssm.layers.ssm``: a layer's, not an op's, so that it has no definition here."""
