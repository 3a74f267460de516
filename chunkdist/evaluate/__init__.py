"""What a model makes of distant tokens: loss by position, and recall."""
