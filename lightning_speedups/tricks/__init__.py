"""The tricks, a wing for each theme."""
