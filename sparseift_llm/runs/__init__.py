"""A training run as files: the recipe that starts it and what it leaves."""
