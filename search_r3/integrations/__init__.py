"""SearchR3 in other people's frameworks: thin adapters, each in a module that only those who use it import."""
