"""The vLLM engine for GPUs."""
