"""Linear layers and the forms in which their weights are held.

Read ``linear`` first: the forms and how one is chosen. ``int8`` is one form with its arithmetic; ``cpu`` tells what
this machine's CPU can do.
"""
