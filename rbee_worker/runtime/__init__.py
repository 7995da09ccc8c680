"""The model runtime that ``load``, ``generate`` and ``serve`` share; start reading at ``engine.py``."""
