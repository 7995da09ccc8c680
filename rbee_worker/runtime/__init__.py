"""The model runtime that ``load``, ``generate`` and ``serve`` share. It has no code for terminals or HTTP.

To see how a token is made, read ``engine`` first, then ``cache`` and ``model``. To follow a load, read ``source`` (with
``hub``), ``architecture``, ``formats`` and ``loading``. Both use ``tokenizer``, ``grammar``, ``machine`` and
``untrusted``. ``convert`` and ``inspection`` are commands of their own.
"""
