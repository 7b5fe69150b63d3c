"""Learning rates, momentum, and when a run ends."""
