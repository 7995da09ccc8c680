"""The model runtime that ``load``, ``generate`` and ``serve`` share. It knows no terminal and no HTTP.

Read ``engine`` first, then ``cache`` and ``model``: that is how a token is made. A load goes through ``source``
(with ``hub``), ``architecture``, ``formats`` and ``loading``. ``tokenizer`` and ``grammar`` stand beside,
``machine`` and ``untrusted`` below; ``convert`` and ``inspection`` are commands of their own.
"""
