"""HTTP over a model and an index: OpenAI-compatible embeddings, search with streamed reasoning, health, metrics."""
