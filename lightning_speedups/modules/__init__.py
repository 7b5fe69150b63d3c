"""What is done to nn.Modules, without Lightning."""
