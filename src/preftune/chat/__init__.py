"""Asking the policies of a run: replies in columns, and conversations from which preferences are kept."""
