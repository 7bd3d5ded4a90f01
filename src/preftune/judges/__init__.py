"""Reward functions to use or to copy from: `"preftune.judges.answers:exact"`. Each can be read alone: none
imports more of preftune than its errors.

One takes `(prompt, response)` and, by name, columns of the data row; a number comes back, or None where it
does not apply (docs/judges.md). `llm` and `endpoint` are none: by them a language model is asked.
"""
