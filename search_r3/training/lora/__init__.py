"""The trainable model: LoRA on the base, its merged copy, and adapters joined into one."""
