"""A finished model for other programs: GGUF, the commands of evaluation harnesses, the hub."""
