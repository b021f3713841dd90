"""The trainable model: LoRA on the base, a merged copy of it, and the concatenation of two adapters."""
