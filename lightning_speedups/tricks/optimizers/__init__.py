"""Optimizers, what they start from, and what becomes of the weights they make."""
