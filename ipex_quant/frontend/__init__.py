"""What `ipex_quant.optimize` does to a model and an optimizer."""
