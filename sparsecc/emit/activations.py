"""The fused activations as the last part of a function body, in ONNX's text form: from z to y."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["ACTIVATION_BODIES"]

ACTIVATION_BODIES: Mapping[str, str] = {
    "": "  y = Identity (z)\n",
    "Relu": "  y = Relu (z)\n",
    "LeakyRelu": "  y = LeakyRelu <alpha: float = @alpha> (z)\n",
    "Clip": "  y = Clip (z, lo, hi)\n",
    "Sigmoid": "  y = Sigmoid (z)\n",
    "Tanh": "  y = Tanh (z)\n",
    "Gelu": """
  root_two = Constant <value = float {1.4142135}> ()
  unit = Constant <value = float {1.0}> ()
  half = Constant <value = float {0.5}> ()
  scaled = Div (z, root_two)
  error = Erf (scaled)
  gate = Add (error, unit)
  gated = Mul (z, gate)
  y = Mul (gated, half)
""",
    "GeluTanh": """
  cubic = Constant <value = float {0.044715}> ()
  root = Constant <value = float {0.7978846}> ()
  unit = Constant <value = float {1.0}> ()
  half = Constant <value = float {0.5}> ()
  squared = Mul (z, z)
  cubed = Mul (squared, z)
  bent = Mul (cubed, cubic)
  sum = Add (z, bent)
  inner = Mul (sum, root)
  tanh = Tanh (inner)
  gate = Add (tanh, unit)
  gated = Mul (z, gate)
  y = Mul (gated, half)
""",
    "Silu": """
  gate = Sigmoid (z)
  y = Mul (z, gate)
""",
    "HardSwish": """
  gate = HardSigmoid <alpha = 0.16666667, beta = 0.5> (z)
  y = Mul (z, gate)
""",
}
