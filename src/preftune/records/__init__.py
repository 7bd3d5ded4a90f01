"""What evaluation writes and everything else reads: frozen types, one reader, one verdict rule. No torch.

*score* is what a judge gives a response, *reward* what training earns per token, *gold* the score of a judge
that no training saw. Files keep the keys that they had before these types; the types carry today's words.
"""
