"""Lowering: choosing a layout per site by measurement, and rewriting sites to sparse operators."""
