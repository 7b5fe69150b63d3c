"""Batches: what is in them, how large they are, and where they come from."""
