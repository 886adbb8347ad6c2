"""Sparse replacements of the dense projections."""
