"""Measuring every policy the same way, with an interval at every number."""
