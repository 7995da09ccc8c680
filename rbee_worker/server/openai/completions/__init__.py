"""Completions: they continue text as it is. ``body`` is what clients send; ``completions`` makes the answer."""
