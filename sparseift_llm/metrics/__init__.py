"""What masks and training do, in numbers: counts, the history of masks, sampled steps, speed."""
