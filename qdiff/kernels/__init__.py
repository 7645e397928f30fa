"""The project's compute kernels: fused CUDA operations, integer products and packed weights.

A fused CUDA kernel is registered as one PyTorch operation, and equals its composition of PyTorch operations to the bit.
"""
