"""The document as one page of HTML that needs nothing else: no script, no other file, no network."""

import base64
import hashlib
import re
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any, Final

from rbee_worker.server.openapi.schemas import REF

STYLE: Final = """\
:root{color-scheme:light dark;font:16px/1.5 system-ui,sans-serif}
body{max-width:64rem;margin:0 auto;padding:1rem}
code,pre{font-family:ui-monospace,monospace;font-size:.9em}
section{border-top:1px solid #8886;margin-top:1.5rem}
h3 code b{display:inline-block;min-width:4.5rem}
table{border-collapse:collapse;width:100%;margin:.5rem 0}
th,td{text-align:left;vertical-align:top;padding:.25rem .75rem .25rem 0;border-top:1px solid #8883}
nav ul{columns:20rem;list-style:none;padding:0}
"""

_DIGEST = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
POLICY: Final = (
    f"default-src 'none'; style-src 'sha256-{_DIGEST}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""``Content-Security-Policy`` of the page: its own style, and nothing else."""

_LIMITS: Final[Mapping[str, str]] = {
    "minimum": ">= {}",
    "exclusiveMinimum": "> {}",
    "maximum": "<= {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "minItems": "at least {} items",
    "maxItems": "at most {} items",
    "maxProperties": "at most {} entries",
    "pattern": "matches {}",
}


def render(document: Mapping[str, Any]) -> str:
    """The page of an OpenAPI document."""
    info = document["info"]
    return "".join(
        (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(info['title'])}</title><style>{STYLE}</style></head><body>",
            f"<h1>{escape(info['title'])} {escape(info['version'])}</h1>",
            _prose(info["description"]),
            '<p><a href="openapi.json">openapi.json</a></p>',
            *_contents(document),
            *(_operation(*named) for named in _operations(document)),
            "<h2>Schemas</h2>",
            *(_schema(name, schema) for name, schema in document["components"]["schemas"].items()),
            "</body></html>\n",
        )
    )


def _operations(document: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Method, path and description of each, group by group."""
    for tag in document["tags"]:
        for path, methods in document["paths"].items():
            for method, operation in methods.items():
                if tag["name"] in operation["tags"]:
                    yield method.upper(), path, operation


def _contents(document: Mapping[str, Any]) -> Iterator[str]:
    yield "<nav><ul>"
    for method, path, operation in _operations(document):
        anchor = operation["operationId"]
        yield f'<li><a href="#{anchor}"><code>{method} {escape(path)}</code></a></li>'
    yield "</ul></nav>"


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> str:
    rows = [(f"<code>{p['name']}</code>", _inline(p["description"])) for p in operation.get("parameters", ())]
    if "requestBody" in operation:
        rows += [("body", _content(operation["requestBody"]))]
    rows += [
        (f"<code>{status}</code>", f"{_inline(response['description'])} {_content(response)}")
        for status, response in operation["responses"].items()
    ]
    return (
        f'<section id="{operation["operationId"]}"><h3><code><b>{method}</b> {escape(path)}</code></h3>'
        f"<p>{_inline(operation['summary'])}. {_inline(operation.get('description', ''))}</p>{_table(rows)}</section>"
    )


def _content(holder: Mapping[str, Any]) -> str:
    held = (f"<code>{media}</code> {_type(entry['schema'])}" for media, entry in holder.get("content", {}).items())
    return ", ".join(held)


def _schema(name: str, schema: Mapping[str, Any]) -> str:
    required = schema.get("required", ())
    rows = [
        (
            f"<code>{escape(field)}</code>",
            _type(value) + (", required" if field in required else ""),
            _inline(value.get("description", "")),
        )
        for field, value in schema.get("properties", {}).items()
    ]
    body = _table(rows) if rows else f"<p>{_type(schema)}</p>"
    return (
        f'<section id="{name}"><h3><code>{name}</code></h3>'
        f"<p>{_inline(schema.get('description', ''))}</p>{body}</section>"
    )


def _type(schema: Mapping[str, Any]) -> str:
    """A schema in words."""
    if "$ref" in schema:
        name = schema["$ref"].removeprefix(REF)
        return f'<a href="#{name}">{name}</a>'
    if "contentSchema" in schema:
        return _type(schema["contentSchema"])
    if "data" in schema.get("properties", {}):
        return f"frames of {_type(schema['properties']['data'])}"
    options = schema.get("anyOf") or schema.get("oneOf")
    if options:
        words = " or ".join(_type(option) for option in options)
    elif "const" in schema:
        words = f"<code>{escape(str(schema['const']))}</code>"
    elif "enum" in schema:
        words = " or ".join(f"<code>{escape(str(value))}</code>" for value in schema["enum"])
    elif schema.get("type") == "array":
        words = f"list of {_type(schema.get('items', {}))}"
    else:
        words = escape(str(schema.get("type", "anything")))
    limits = [escape(text.format(schema[key])) for key, text in _LIMITS.items() if key in schema]
    if "default" in schema:
        limits.append(f"default <code>{escape(str(schema['default']).lower())}</code>")
    return ", ".join([words, *limits])


def _table(rows: list[Any]) -> str:
    cells = ("".join(f"<td>{cell}</td>" for cell in row) for row in rows)
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"


def _prose(text: str) -> str:
    """Paragraphs and lists of the little Markdown that the description is written in."""
    out = []
    for block in text.strip().split("\n\n"):
        if block.startswith("- "):
            items = "".join(f"<li>{_inline(item)}</li>" for item in block.removeprefix("- ").split("\n- "))
            out.append(f"<ul>{items}</ul>")
        else:
            out.append(f"<p>{_inline(block)}</p>")
    return "".join(out)


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
