"""Quantized networks elsewhere: export to ONNX, running the exported models, and weights for other programs."""
