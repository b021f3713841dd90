"""Documents into chunks: by their structure, within the model's limit of tokens."""
