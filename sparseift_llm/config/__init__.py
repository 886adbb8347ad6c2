"""What a user asks for: the transformation, the mask updates, and how configs are parsed. Imports no torch."""

from typing import TYPE_CHECKING

from sparseift_llm._moved import old_names
from sparseift_llm.config.dst import DSTConfig
from sparseift_llm.config.families import Doped, Factorized, Parallel, Wide
from sparseift_llm.config.rules import FamilyRule
from sparseift_llm.config.transform import SparseIFTConfig

if not TYPE_CHECKING:  # so that type checkers still know what is here
    __getattr__ = old_names(__name__)

__all__ = ["DSTConfig", "Doped", "Factorized", "FamilyRule", "Parallel", "SparseIFTConfig", "Wide"]
