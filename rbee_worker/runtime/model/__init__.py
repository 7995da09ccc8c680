"""The model as torch runs it.

Read ``decoder`` first, from top to bottom. Then its parts: ``attention``, ``rope``, ``layers`` (norms and
activations), ``moe``, ``linear``.
"""
