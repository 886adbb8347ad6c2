"""The implementations of the block-sparse products, one file per kind of kernel."""
