"""Where a token stands: learned, sinusoidal and rotary positions."""
