"""From a model's files to a model that can run.

Read ``load`` first: the phases and their events. Then ``plan`` (what headers and configs tell), ``groups`` (which
tensor goes where), ``fit`` (is there room), ``parts`` (in what memory a part is put together) and ``reader`` (the
threads that read).
"""
