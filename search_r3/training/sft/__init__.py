"""Stage 1: supervised fine-tuning with contrastive learning."""
