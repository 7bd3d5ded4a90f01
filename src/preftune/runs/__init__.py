"""A run: its stages, its directory and what trains them."""
