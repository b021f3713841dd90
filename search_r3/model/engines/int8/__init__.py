"""The int8 engine for CPUs."""
