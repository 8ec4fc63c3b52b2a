"""Pruning passes: zeros in weights, the graph untouched."""
