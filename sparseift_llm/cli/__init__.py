"""The `sparseift` command."""

from typing import TYPE_CHECKING

from sparseift_llm._moved import old_names
from sparseift_llm.cli.program import main

if not TYPE_CHECKING:  # so that type checkers still know what is here
    __getattr__ = old_names(__name__)

__all__ = ["main"]
