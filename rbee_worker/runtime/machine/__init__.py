"""The machine that the worker runs on.

``devices`` has the devices and their memory, ``cgroup`` the memory limits of a container, ``storage`` the file systems
and how to read from them.
"""
