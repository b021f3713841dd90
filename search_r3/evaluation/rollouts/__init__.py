"""What sampled reasoning earns before and after training."""
