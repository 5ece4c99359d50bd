"""Inference on several devices: what they exchange, how it is compressed, and what it costs."""
