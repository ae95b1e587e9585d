"""Composition of layers: programs, combinators, merging."""
