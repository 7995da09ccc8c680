"""The parts of HTTP that all routes share.

A request passes them in this order: ``listen``, ``tls``, ``protocol``, ``middleware``, ``access`` with ``keys``.
Handlers use ``fields`` (the parts of bodies), ``envelope`` (errors, and reading of bodies), ``operation`` and
``disconnect``.
"""
