"""Quantized tensors and linears: schemes, the plan, and the layer that runs on integers."""
