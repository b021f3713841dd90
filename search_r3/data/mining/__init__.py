"""Hard negatives, selection, a teacher, and decontamination."""
