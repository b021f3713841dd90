"""Presenting hits: snippets, highlighted words, output for the terminal."""
