"""What the YAML and the command line say, and what of it is refused."""
