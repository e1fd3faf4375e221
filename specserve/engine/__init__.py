"""The engine: its core, in a process of its own, and the client that drives it."""
