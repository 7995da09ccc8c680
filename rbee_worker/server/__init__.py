"""The HTTP side of the worker: routes, Server-Sent Events, and the process that serves them.

``app.create_app`` puts a :class:`rbee_worker.worker.worker.Worker` behind HTTP; ``run.serve`` is the whole ``serve``
command.
"""
