"""The OpenAPI document as one HTML page. The page needs no script, no other file and no network."""

import base64
import hashlib
from collections.abc import Mapping
from importlib.resources import files
from typing import Any, Final

from jinja2 import Environment

STYLE: Final = """\
:root{color-scheme:light dark;font:16px/1.5 system-ui,sans-serif}
body{max-width:64rem;margin:0 auto;padding:1rem}
code{font-family:ui-monospace,monospace;font-size:.9em}
summary b{display:inline-block;min-width:4.5rem}
details,section{border-top:1px solid #8886;padding:.25rem 0}
table{border-collapse:collapse;width:100%}
td{vertical-align:top;padding:.25rem .75rem .25rem 0;border-top:1px solid #8883}
.lines{white-space:pre-line}
"""

_DIGEST = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
POLICY: Final = (
    f"default-src 'none'; style-src 'sha256-{_DIGEST}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""``Content-Security-Policy`` of the page. It allows only the page's own style."""

_LIMITS: Final = (
    "minimum",
    "exclusiveMinimum",
    "maximum",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "maxProperties",
    "pattern",
    "default",
)


def render(document: Mapping[str, Any]) -> str:
    """Render an OpenAPI document as HTML."""
    template = files(__package__).joinpath("page.html").read_text("utf-8")
    return Environment(autoescape=True).from_string(template).render(document, style=STYLE, limits=_LIMITS)
