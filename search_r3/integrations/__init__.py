"""Adapters for other frameworks, each in a module that is imported only where it is used."""
