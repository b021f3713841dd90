"""Running the model for many requests at once: static and continuous batching."""
