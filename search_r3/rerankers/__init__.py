"""Rerankers: a second look at a few documents that a first search found."""
