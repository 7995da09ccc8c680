"""The worker's own routes: inference, loading, and the worker's state.

Read ``routes`` first, then ``bodies`` (what clients send) and ``frames`` (what streams hold).
"""
