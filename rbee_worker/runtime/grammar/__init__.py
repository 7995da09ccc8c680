"""Structured output: what generated text must match.

Read ``compiler`` first. Then ``build`` (llguidance compiles a grammar within limits), ``trial`` (the process in which
new grammars are tried out) and ``mask`` (which tokens may come next).
"""
