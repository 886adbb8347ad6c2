"""A training run as files: the recipe that starts it and the record that it leaves."""
