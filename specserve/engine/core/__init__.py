"""EngineCore and its process."""
