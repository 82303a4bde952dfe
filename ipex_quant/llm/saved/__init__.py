"""Models on disk: reading low-precision checkpoints, and how transformers finds a quantized model."""
