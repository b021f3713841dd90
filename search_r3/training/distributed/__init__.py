"""Several processes: collectives and sharding."""
