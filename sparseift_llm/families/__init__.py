"""One file per family of Sparse-IFT: how a dense model becomes sparse at the same number of multiply-adds."""
