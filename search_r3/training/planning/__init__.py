"""What a run will need: memory, a dry run."""
