"""The machine that the worker runs on.

``devices`` knows the devices and their memory, ``cgroup`` what a container leaves of the host's, ``storage`` where
files lie and how they are best read.
"""
