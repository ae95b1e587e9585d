"""Normalization over features, channels and batches."""
