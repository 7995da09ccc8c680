"""The worker's own routes: inference, loading, and what the worker says of itself.

Read ``routes`` first, then ``bodies``: what it is sent.
"""
