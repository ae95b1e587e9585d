"""Diffusion: the process, the objective, samplers."""
