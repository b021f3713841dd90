"""Where an index is stored, on disk or on object storage, and who may write to it."""
