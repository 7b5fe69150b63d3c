"""One trick, one file, named after its class."""
