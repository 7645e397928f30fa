"""Quantized networks inside diffusers pipelines: quantize, save, and load with plain ``from_pretrained``.

Needs ``pip install "qdiff[diffusers]"``; ``import qdiff`` registers the backend (`registration`).
"""
