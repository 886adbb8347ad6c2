"""What dense layers and their sparse twins cost in time and memory, measured side by side."""

from typing import TYPE_CHECKING

from sparseift_llm._moved import old_names

if not TYPE_CHECKING:  # so that type checkers still know what is here
    __getattr__ = old_names(__name__)
