"""Autograd functions under the sparse layers."""
