"""Quantized networks in other runtimes: export to ONNX, and running the exported models."""
