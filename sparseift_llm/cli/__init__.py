"""The `sparseift` command."""

from sparseift_llm.cli.program import main

__all__ = ["main"]
