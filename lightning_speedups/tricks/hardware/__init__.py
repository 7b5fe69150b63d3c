"""The hardware, used fully."""
