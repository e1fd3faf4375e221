"""Plots of results, from their rows; one file a benchmark."""
