"""Tables, model cards and figures from committed results."""
