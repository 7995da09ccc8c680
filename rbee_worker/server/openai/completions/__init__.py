"""Completions: text continued as it is. All of it is in ``completions``."""
