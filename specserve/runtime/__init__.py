"""Tensors: device rows, KV caches, the ModelRunner and its executor."""
