"""What a model is, as its ``config.json`` says; no torch.

Read ``config`` first: all that the decoder needs to know. Then ``table`` (the families and what each calls its
weights), ``readers`` (how each differs from Llama), ``rope``, and ``roles`` (names and shapes of a layer's tensors).
"""
