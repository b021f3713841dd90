"""Adapters for other frameworks, one module each, imported only when used."""
