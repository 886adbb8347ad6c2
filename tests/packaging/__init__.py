"""What the installed package is: its imports, its old paths, and its wheel."""
