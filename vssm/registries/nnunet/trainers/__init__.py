"""What nnU-Net imports: one module, found by the names of its classes."""
