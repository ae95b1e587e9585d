"""Layers over axes of space: convolution, pooling, resizing."""
