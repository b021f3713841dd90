"""Files and data sets in and out."""
