"""Narrower numbers: int8 weights and uint8 activations, written as standard ONNX; weights rounded to 16 bits."""
