"""From requests to tokens: the core, one step at a time.

Read ``engine`` first: its ``step`` is the loop. Then what a step uses, in this order: ``prepare`` (request to
sequence), ``sequence``, ``waiting``, ``scheduler``, ``sampler``, ``decide``, ``prompt_lookup``, ``stop``. ``stats``
is what others may read of it.
"""
