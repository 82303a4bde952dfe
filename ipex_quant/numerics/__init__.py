"""Quantization schemes, quantized weights and the arithmetic between them: plain torch, no modules."""
