"""Where an index is stored: the backends, ours and those of other packages."""
