"""Weight-only quantization algorithms: from a float weight and calibration inputs to codes."""
