"""What a model is, read from its ``config.json``. Nothing here imports torch.

Read ``config`` first: it holds all that the decoder needs to know. Then ``table`` (the families and the names of their
weights), ``readers`` (how each family differs from Llama), ``rope``, and ``roles`` (names and shapes of a layer's
tensors).
"""
