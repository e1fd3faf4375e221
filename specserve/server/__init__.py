"""HTTP: OpenAI's API, the adapters API, health and metrics (aiohttp)."""
