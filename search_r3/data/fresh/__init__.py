"""A test set out of documents that no model has seen: what packages released lately say about themselves."""
