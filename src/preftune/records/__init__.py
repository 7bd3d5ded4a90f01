"""What evaluation writes and everything else reads: frozen types, one reader, one verdict rule. No torch.

*score* is what a judge gives a response, *reward* what training earns per token, *gold* the score of a judge
that no contestant was trained on. Types and files carry these words; older files' keys are read as well.
"""
