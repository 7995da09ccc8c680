"""``GET /openapi.json`` and ``GET /docs``."""

import functools
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from rbee_worker.server.http.envelope import ALWAYS, Json, off_loop
from rbee_worker.server.http.operation import Operation, routes
from rbee_worker.server.openapi.document import build
from rbee_worker.server.openapi.page import POLICY, render


class Described:
    """All routes: the given ones, and the two that describe all of them.

    Args:
        others: the other routes.
        keyed: whether requests need an API key.

    Attributes:
        routes: all routes.
    """

    def __init__(self, others: Sequence[Route], *, keyed: bool) -> None:
        self.routes = [*others, *routes(self)]
        self._keyed = keyed

    @Operation("GET", "/openapi.json", tag="worker")
    async def document(self, _request: Request) -> Json[dict[str, Any]]:
        """This description."""
        return Json(await off_loop(ALWAYS, self._document))

    @Operation("GET", "/docs", tag="worker", media_type="text/html")
    async def page(self, _request: Request) -> Response:
        """This description, as a page."""
        return HTMLResponse(await off_loop(ALWAYS, self._page), headers={"Content-Security-Policy": POLICY})

    @functools.cache  # noqa: B019 - lives as long as the application
    def _document(self) -> dict[str, Any]:
        return build(self.routes, keyed=self._keyed)

    @functools.cache  # noqa: B019 - lives as long as the application
    def _page(self) -> str:
        return render(self._document())
