"""Stage 2: group relative policy optimization with a retrieval reward."""
