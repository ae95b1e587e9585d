"""Batches of data for training."""
