"""What touches disk, devices or a terminal."""
