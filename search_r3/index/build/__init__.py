"""Building an index: what changed is found, embedded and written."""
