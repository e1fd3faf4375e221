"""Attention over pages: the backends, and the kernels of the Triton one."""
