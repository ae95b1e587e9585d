"""Attention: the layers, their product, their cache, and cuDNN's kernel."""
