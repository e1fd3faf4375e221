"""Kernels, each beside its torch reference. Knows nothing of the layers above."""
