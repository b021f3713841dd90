"""Reasoning traces for training pairs."""
