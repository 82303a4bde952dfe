"""Weight-only quantization algorithms: from a float weight, and what calibration saw of its input, to codes."""
