"""The order contract of streams as a check that can be run: ``python -m rbee_worker.conformance --addr HOST:PORT``.

``order`` checks events, ``frames`` checks bytes; both are pure, and the project's own tests call them. ``watch``
subscribes to a server and lets them look.
"""
