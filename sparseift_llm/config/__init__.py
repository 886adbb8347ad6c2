"""What a user asks for: the transformation, the mask updates, and how configs are parsed. Imports no torch."""

from sparseift_llm.config.transform import DSTConfig, FamilyRule, SparseIFTConfig

__all__ = ["DSTConfig", "FamilyRule", "SparseIFTConfig"]
