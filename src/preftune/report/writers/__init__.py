"""ANALYSIS.md and report.html out of blocks."""
