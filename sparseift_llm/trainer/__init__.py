"""The transformers Trainer's side of sparse training: the callback and what it logs."""
