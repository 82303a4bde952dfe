"""The engine behind `ipex_quant.quantization`: configurations, observed models, calibration and conversion."""
