"""The `sparseift` command."""
