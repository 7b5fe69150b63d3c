"""Muon as an optimizer, a mixin and a callback."""
