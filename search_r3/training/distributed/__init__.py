"""Training with several processes: collectives and sharding."""
