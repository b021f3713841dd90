"""Sources of training pairs: one module per kind of source, each with a function that returns `BuiltPairs`."""
