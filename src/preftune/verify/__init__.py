"""Proof that a killed run ends in the same bytes."""
