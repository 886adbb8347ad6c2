"""Sparse projections, one file per storage."""
