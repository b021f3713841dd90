"""External models, and SearchR3 as an encoder for MTEB."""
