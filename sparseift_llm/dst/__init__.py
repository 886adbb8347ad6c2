"""Dynamic sparse training: what changes in a mask, when, and what else has to change with it."""
