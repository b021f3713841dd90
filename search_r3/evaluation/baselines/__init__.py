"""Other embedding models as baselines, and SearchR3 as an encoder for MTEB."""
