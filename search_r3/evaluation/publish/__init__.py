"""Tables and model cards, generated from committed results."""
