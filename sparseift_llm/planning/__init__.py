"""What a transformation makes of a model, in numbers, before anything is built."""
