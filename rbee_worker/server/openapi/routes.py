"""``GET /openapi.json`` and ``GET /docs``."""

import functools
import json
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from rbee_worker.server.http.envelope import ALWAYS, off_loop
from rbee_worker.server.openapi.document import build
from rbee_worker.server.openapi.page import POLICY, render


class Described:
    """Routes, and those that describe them and themselves.

    Args:
        routes: every other route.
        keyed: an API key is asked for.
    """

    def __init__(self, routes: Sequence[Route], *, keyed: bool) -> None:
        self.routes = [
            *routes,
            Route("/openapi.json", self.document, methods=["GET"]),
            Route("/docs", self.page, methods=["GET"]),
        ]
        self._keyed = keyed

    async def document(self, _request: Request) -> Response:
        """The OpenAPI document."""
        return Response(await off_loop(ALWAYS, self._json), media_type="application/json")

    async def page(self, _request: Request) -> Response:
        """The page."""
        return HTMLResponse(await off_loop(ALWAYS, self._html), headers={"Content-Security-Policy": POLICY})

    @functools.cache  # noqa: B019 - lives as long as the application
    def _json(self) -> bytes:
        return json.dumps(build(self.routes, keyed=self._keyed), separators=(",", ":")).encode()

    @functools.cache  # noqa: B019 - lives as long as the application
    def _html(self) -> str:
        return render(json.loads(self._json()))
