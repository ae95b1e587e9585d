"""Recurrent cells, and the loop over time."""
