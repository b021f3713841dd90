"""Files into documents: the extension point for file formats, our readers, and what a path holds."""
