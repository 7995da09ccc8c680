"""``--addr``, to bind and to reach."""

import pytest

from rbee_worker.address import HostPort, parse_base_url, parse_host_port
from rbee_worker.errors import InvalidRequest


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:8080", ("127.0.0.1", 8080)),
        ("localhost:0", ("localhost", 0)),
        (":80", ("0.0.0.0", 80)),  # noqa: S104 - nothing is bound
        ("[::1]:8080", ("::1", 8080)),
        ("[::]:65535", ("::", 65535)),
    ],
)
def test_host_port(text: str, address: tuple[str, int]):
    assert parse_host_port(text) == address


@pytest.mark.parametrize(
    "text",
    [
        *("", "8080", "localhost", "localhost:", "localhost:http", "localhost:65536", "localhost:-1", "::1:8080"),
        *("a b:1", "[::1]", "[::1:80", "host:٣", "http://host:1", "user@host:1"),
    ],
)
def test_no_host_port(text: str):
    with pytest.raises(InvalidRequest, match="--addr"):
        parse_host_port(text)


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("[::1]:8080", "http://[::1]:8080"),
        (":8080", "http://127.0.0.1:8080"),
        ("[::]:8080", "http://[::1]:8080"),
        ("https://worker.example/", "https://worker.example"),
        ("http://worker.example:81/rbee/", "http://worker.example:81/rbee"),
    ],
)
def test_base_url(text: str, url: str):
    assert parse_base_url(text) == url


@pytest.mark.parametrize("text", ["ftp://h:1", "http://", "http://h:x", "http://[::1", "http://h?a=b", "https:/h", "h"])
def test_no_base_url(text: str):
    with pytest.raises(InvalidRequest, match="--addr"):
        parse_base_url(text)


def test_brackets_come_back():
    assert str(HostPort("::1", 80)) == "[::1]:80"
    assert str(HostPort("h", 80)) == "h:80"
