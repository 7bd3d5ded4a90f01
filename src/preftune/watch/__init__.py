"""A run while it goes on, read from its files: the panel of `preftune run` and `preftune watch`."""
