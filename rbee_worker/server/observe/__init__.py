"""What operators see: metrics and traces.

``metrics`` writes the page of figures, ``figures`` counts jobs for it, ``tracing`` makes the spans.
"""
