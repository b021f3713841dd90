"""Planning a run: memory estimate and dry run."""
