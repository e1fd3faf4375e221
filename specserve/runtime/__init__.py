"""Tensors: device rows, KV caches, CUDA graphs, and the ModelRunner that carries out plans."""
