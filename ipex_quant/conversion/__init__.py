"""The implementation of `ipex_quant.quantization`: configurations, `prepare`, calibration and `convert`."""
