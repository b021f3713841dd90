"""Rewards of sampled reasoning before and after training."""
