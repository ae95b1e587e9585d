"""Disk, devices and the terminal: logs and interrupts."""
