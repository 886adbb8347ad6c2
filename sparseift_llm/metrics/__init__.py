"""What masks and training do, in numbers: counts, the history of masks, sampled steps, speed."""

from typing import TYPE_CHECKING

from sparseift_llm._moved import old_names

if not TYPE_CHECKING:  # so that type checkers still know what is here
    __getattr__ = old_names(__name__)
