"""The built-in data set, with its true (gold) score."""
