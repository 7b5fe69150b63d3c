"""Data in memory: the loader over tensors, the trick that puts it in place of others, and what makes samples."""
