"""The description of the HTTP API: an OpenAPI 3.1 document made from what validates, and a page of it."""

from rbee_worker.server.openapi.routes import Described

__all__ = ["Described"]
