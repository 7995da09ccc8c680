"""GGUF files, presented as Hugging Face models.

Read ``header`` first: it parses the bytes. Then ``families`` (ggml's names and Hugging Face's) and ``model``.
"""
