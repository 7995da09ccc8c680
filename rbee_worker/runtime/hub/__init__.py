"""Downloads models from the Hugging Face hub.

Read ``download`` first: the steps, and the progress that they report. Then ``client`` (which files, the hub's cache,
what failures mean) and ``transfer`` (the bytes).
"""
