"""One file per family of Sparse-IFT: how a dense model's shape becomes the sparse one's."""
