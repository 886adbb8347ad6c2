"""What config.json says of a Sparse-IFT model: its record, with one specification per projection, and its mark."""
