"""The kit's fixtures."""

from serverkit.fixtures import kit_on_path, scripted_server, tiny

__all__ = ["kit_on_path", "scripted_server", "tiny"]
