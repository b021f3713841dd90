"""Reasoning texts for training pairs."""
