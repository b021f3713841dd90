"""A checkpoint for others: merged, ONNX, sentence-transformers, the Hugging Face Hub."""
