"""The optimizers that a controller can follow: torch's own, and DeepSpeed ZeRO's."""
