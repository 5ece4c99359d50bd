"""Post-training quantization of a whole model: the `quantize` verb, its report, and (with calibration and search) what chooses each layer's scheme."""
