"""What computes attention: the torch backend and the Triton kernels."""
