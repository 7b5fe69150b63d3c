"""Labels and the losses that read them."""
