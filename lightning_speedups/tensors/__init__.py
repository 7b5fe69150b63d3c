"""Tensors that pretend, and tensors that are kept by sample."""
