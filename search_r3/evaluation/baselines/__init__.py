"""Other people's models, and ours for MTEB."""
