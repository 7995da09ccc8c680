"""From a model's files to a model that can run.

Read ``load`` first: the phases and their events. Then ``weights`` (which tensor goes where), ``fit`` (is there
room) and ``reader`` (the threads that read).
"""
