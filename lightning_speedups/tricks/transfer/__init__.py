"""Transfer learning: what is frozen, when, and what that saves."""
