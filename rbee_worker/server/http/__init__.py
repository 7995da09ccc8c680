"""HTTP below the routes.

In the order in which a request meets them: ``listen``, ``tls``, ``protocol``, ``middleware``, ``access`` with
``keys``, ``fields`` (what bodies are made of), ``envelope`` (errors, and the reading of bodies).
"""
