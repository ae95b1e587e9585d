"""Attention, from the formula to the layers."""
