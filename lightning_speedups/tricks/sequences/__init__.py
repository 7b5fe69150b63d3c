"""Sequences of different lengths: like with like, packed, short ones first."""
