"""Spectral quantities of masks and weights, and how they go with the final loss of runs."""
