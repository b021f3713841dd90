"""Who runs the model for many requests: static and continuous batching."""
