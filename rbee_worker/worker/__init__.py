"""One engine behind asyncio, for a server.

Read ``worker`` first: what a server asks of it. Then the requests (``job``, ``jobs``, ``pace``), the loads
(``claim``, ``broadcast``, ``loads``) and the thread that runs the model (``engine_thread``).
"""
