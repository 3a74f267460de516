"""What is known of transformers' models: layers, arguments, FLOPs, exact classes."""
