"""Dynamic sparse training in any loop: when masks change, by which rule, and what else changes with them."""
