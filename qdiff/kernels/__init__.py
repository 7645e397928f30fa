"""Kernels of our own for CUDA, each one operation of PyTorch beside the plain composition that it equals to the bit."""
