"""Partitioning: where the work of constant sparse operands is cut into parts, stored in the model."""
