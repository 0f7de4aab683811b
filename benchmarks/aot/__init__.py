"""What the Triton kernels need of each architecture, compiled on a machine without a GPU."""
