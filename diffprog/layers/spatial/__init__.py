"""Layers over spatial axes: convolution, pooling, resizing."""
