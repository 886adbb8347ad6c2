"""Masks as pure functions: how many weights a layer keeps, which ones at first, which ones next."""
