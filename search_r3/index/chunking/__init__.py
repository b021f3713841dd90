"""Cutting documents into chunks: by their structure, within the model's token limit."""
