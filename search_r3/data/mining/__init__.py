"""Mining hard negatives, selecting pairs, teacher embeddings, and decontamination."""
