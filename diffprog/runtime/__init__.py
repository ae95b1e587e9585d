"""Access to disk, signals and the terminal."""
