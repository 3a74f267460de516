"""What waits for the backward: keys and values with their gradients, states, host memory."""
