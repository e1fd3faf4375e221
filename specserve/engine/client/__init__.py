"""AsyncEngine: tokens in and out, recovery; no torch."""
