"""Passes on the structure of a model: order of channels, removal of channels, heads and blocks."""
