"""Reading and writing files and data sets."""
