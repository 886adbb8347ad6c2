"""Turning a dense model into its sparse twin and back: layers, initial scales, trained starts."""
