"""GGUF files, seen as Hugging Face models.

Read ``header`` first: the bytes. Then ``families`` (ggml's names and Hugging Face's) and ``model``.
"""
