"""The optimizers whose state a mask update has to zero: torch's own, and DeepSpeed ZeRO."""
