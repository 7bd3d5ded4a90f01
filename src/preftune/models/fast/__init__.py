"""What makes passes over a model cheap; private to `models`."""
