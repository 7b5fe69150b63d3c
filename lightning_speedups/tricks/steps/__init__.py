"""What makes a step: the batches behind it, and how they come to the device."""
