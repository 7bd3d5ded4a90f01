"""Measuring the finished stages of a run: policies, reward models, pairs from elsewhere, two runs."""
