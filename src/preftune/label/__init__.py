"""Judgements by people: two replies side by side, blind; what they say is trained on."""
