"""Rewrites that keep the outputs to rounding and leave fewer, plainer nodes."""
