"""The HTTP server: routes, Server-Sent Events, and the process that serves them.

``app.create_app`` makes an application that serves a :class:`rbee_worker.worker.worker.Worker`. ``run.serve`` is the
command ``serve``.
"""
