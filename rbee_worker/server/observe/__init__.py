"""Metrics and traces, for operators.

``metrics`` writes the page for Prometheus, ``figures`` counts jobs for it, and ``tracing`` makes spans.
"""
