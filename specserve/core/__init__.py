"""Plain data that every layer may use: requests, plans, messages, errors. Standard library and msgspec only."""
