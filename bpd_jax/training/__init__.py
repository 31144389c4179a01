"""Training: the loss of all heads, the optimisers, one step, and the loop around it."""
