"""Post-training quantization of a whole model: the `quantize` verb and its report."""
