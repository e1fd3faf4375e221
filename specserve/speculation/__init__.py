"""Proposers: each guesses the next tokens of the rows it is given. One file each, unknown to each other."""
