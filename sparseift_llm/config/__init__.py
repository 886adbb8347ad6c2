"""What a user asks for: the transformation, the mask updates, and how configs are parsed. Imports no torch."""

from typing import TYPE_CHECKING

from sparseift_llm._moved import old_names
from sparseift_llm.config.transform import DSTConfig, FamilyRule, SparseIFTConfig

if not TYPE_CHECKING:  # so that type checkers still know what is here
    __getattr__ = old_names(__name__)

__all__ = ["DSTConfig", "FamilyRule", "SparseIFTConfig"]
