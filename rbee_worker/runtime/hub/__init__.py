"""Models of the Hugging Face hub, brought onto this machine.

Read ``download`` first: the steps and what is told of them. Then ``client`` (which files, the hub's cache, what
failures mean) and ``transfer`` (the bytes).
"""
