"""Passes that put a smaller chain of operators in the place of a linear site."""
