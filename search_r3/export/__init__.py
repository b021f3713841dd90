"""Exporting checkpoints: merged, ONNX, sentence-transformers, the Hugging Face Hub."""
