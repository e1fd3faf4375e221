"""A scheduler's surroundings without models: a device that computes lengths only, adapters that are names only."""
