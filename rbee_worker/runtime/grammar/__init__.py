"""Structured output: what generated text must match.

Read ``compiler`` first, then ``build`` (a grammar within its limits), ``trial`` (the process in which new grammars
are tried out) and ``mask`` (which tokens may come next).
"""
