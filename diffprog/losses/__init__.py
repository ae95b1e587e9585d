"""Arrays in, numbers out: losses, metrics, penalties."""
