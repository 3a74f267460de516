"""What the trainer is fed: where samples come from, and which of them it refuses."""
