"""What the library knows about transformers models: widths, projections, norms, presets."""
