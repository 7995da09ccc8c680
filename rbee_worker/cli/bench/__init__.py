"""``rbee-worker bench``: measurements that anyone can repeat; ``result`` is what ``decode`` and ``serve`` share."""
