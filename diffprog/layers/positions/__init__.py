"""Position embeddings: learned, sinusoidal and rotary."""
