"""Quantisation: int8 weights and uint8 activations, written as standard ONNX."""
