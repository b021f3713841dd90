"""Where training pairs come from: one module a kind of source, each a function that returns `BuiltPairs`."""
