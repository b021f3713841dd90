"""A test set of documents that no model has seen: the documentation of recently released packages."""
