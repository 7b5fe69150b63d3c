"""Loaders and samplers, one in a file."""
