"""Hybrid forms of a weight: dense and sparse tiles, a sparse core in small dense factors, sparse and low rank."""
