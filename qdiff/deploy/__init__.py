"""Quantized networks as other programs run them."""
