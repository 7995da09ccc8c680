"""The machine that the worker runs on.

``devices`` has the devices and their memory, ``storage`` the file systems and how to read from them. The limits of a
container are in ``rbee_worker.cgroup``.
"""
