"""The description of the HTTP API: an OpenAPI 3.1 document, made from the types that validate, and an HTML page."""

from rbee_worker.server.openapi.routes import Described

__all__ = ["Described"]
