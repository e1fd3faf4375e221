"""A comparison as its reader gets it: one HTML file, pictures, JSON Lines, a table for the terminal."""
