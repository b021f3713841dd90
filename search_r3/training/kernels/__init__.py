"""Hand-written forward and backward passes, for CPUs."""
