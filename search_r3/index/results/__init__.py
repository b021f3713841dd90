"""What is shown of a search's hits: snippets, highlighted words, a page for the terminal."""
