"""Training pairs written by a language model: planned, requested, checked by a round trip, and resumable."""
