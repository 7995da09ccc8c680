"""Host names, other sites' pages, allowed origins, and what a request's head may hold."""

import pytest

from rbee_worker.config import ServerConfig
from rbee_worker.errors import InvalidRequest
from rbee_worker.server.app import create_app
from rbee_worker.server.http.access import MAX_HEADERS, cors_origins, host_name, host_patterns, matches

APP = "https://app.example.org"
PREFLIGHT = {"Origin": APP, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
KEY = {"Authorization": "Bearer k"}
INFERENCE = "/v1/inference"


def unload(server, **headers):
    return server.ask("POST", "/v1/unload", None, {k.replace("_", "-"): v for k, v in headers.items()}).status


def named(server, host, path="/v1/unload", **headers):
    lines = "".join(f"{k}: {v}\r\n" for k, v in headers.items())
    method = "POST" if path == "/v1/unload" else "GET"
    request = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: 0\r\n{lines}\r\n"
    return int(server.raw(request.encode()).split()[1])


@pytest.mark.parametrize("options", [{"api_keys": ("k",)}, {"allow_unauthenticated": True}, {}], ids=str)
def test_trusted_hosts(start, options):
    server = start(trusted_hosts=("worker.example.org", "*.pool.example", "[2001:db8::1]"), **options)
    trusted = ["worker.example.org", "WORKER.example.org:8080", "a.pool.example", "a.b.pool.example:1"]
    own = ["127.0.0.1:8080", "localhost", "[::1]:80"]
    for host in (*trusted, *own, "[2001:db8::1]:80"):
        assert named(server, host, **KEY) == 200, host
    for host in ("pool.example", "evilpool.example", "evil.example", "worker.example.org.evil.example", ""):
        assert named(server, host, **KEY) == 403, host


def test_probes_ask_under_any_name(start):
    server = start(trusted_hosts=("worker.example.org",))
    assert named(server, "10.1.2.3:8080", "/livez") == 200
    assert named(server, "10.1.2.3:8080", "/metrics") == 403


def test_a_name_is_looked_at_before_the_key(start):
    assert named(start(trusted_hosts=("a.example",), api_keys=("k",)), "b.example") == 403


def test_with_a_key_any_name_will_do_until_some_are_trusted(start):
    assert named(start(api_keys=("k",)), "any.example", **KEY) == 200


@pytest.mark.parametrize("host", ["", "a b", "a.example:80", "*", "*example.org", "a.*.org", "http://a", "-a"])
def test_no_name_of_a_host(stand_in, host):
    with pytest.raises(InvalidRequest, match="--trusted-host"):
        create_app(stand_in.Worker(), ServerConfig(trusted_hosts=(host,)))


def test_names_and_patterns():
    assert [host_name(h) for h in ("A.b:1", "[::1]:80", "[::1]", "a")] == ["a.b", "::1", "::1", "a"]
    assert host_patterns(["A.Example", "[::1]"]) == ("a.example", "::1")
    assert not matches("example.org", "*.example.org")


def test_a_preflight_is_answered_without_a_key(start):
    server = start(api_keys=("k",), cors_origins=(APP,))
    reply = server.ask("OPTIONS", INFERENCE, None, PREFLIGHT)
    assert reply.status == 200
    assert reply.headers["access-control-allow-origin"] == APP
    assert "authorization" in reply.headers["access-control-allow-headers"]
    assert {"GET", "POST", "DELETE"} <= set(reply.headers["access-control-allow-methods"].split(", "))
    assert reply.headers["x-correlation-id"]
    other = server.ask("OPTIONS", INFERENCE, None, {**PREFLIGHT, "Origin": "https://evil.example"})
    assert other.status == 400
    assert "access-control-allow-origin" not in other.headers


def test_without_origins_there_are_no_preflights(start):
    reply = start(api_keys=("k",)).ask("OPTIONS", INFERENCE, None, PREFLIGHT)
    assert reply.status == 401
    assert "access-control-allow-origin" not in reply.headers


@pytest.mark.parametrize("body", [{"prompt": "p"}, {"prompt": ""}], ids=["stream", "error"])
def test_a_page_of_an_allowed_origin_may_read_streams_and_errors(start, body):
    server = start(api_keys=("k",), cors_origins=(APP,))
    reply = server.ask("POST", INFERENCE, body, {**KEY, "Origin": APP})
    assert reply.headers["access-control-allow-origin"] == APP
    exposed = {name.strip().lower() for name in reply.headers["access-control-expose-headers"].split(",")}
    assert exposed == {"x-correlation-id", "x-request-id", "retry-after"}
    refused = server.ask("POST", INFERENCE, body, {"Origin": APP})
    assert (refused.status, refused.headers["access-control-allow-origin"]) == (401, APP)
    other = server.ask("POST", INFERENCE, body, {**KEY, "Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers


def test_an_allowed_origin_passes_where_no_key_protects(start):
    foreign = {"Sec_Fetch_Site": "cross-site"}
    server = start(cors_origins=(APP,))
    assert unload(server, Origin=APP, **foreign) == 200
    assert unload(server, Origin="https://evil.example", **foreign) == 403
    assert unload(server, **foreign) == 403
    assert unload(start(cors_origins=("*",)), Origin="https://any.example", **foreign) == 200


def test_a_browser_that_says_its_origin_only(start):
    server = start()
    assert unload(server, Origin="http://evil.example") == 403
    assert unload(server, Origin="null") == 403
    assert unload(server, Origin=f"http://127.0.0.1:{server.port}") == 200
    assert unload(server) == 200


@pytest.mark.parametrize("origin", ["", "app.example.org", "https://a.example/", "https://a.example/x", "https://a b"])
def test_no_origin(stand_in, origin):
    with pytest.raises(InvalidRequest, match="--cors-origin"):
        create_app(stand_in.Worker(), ServerConfig(cors_origins=(origin,)))


def test_origins_are_compared_in_lower_case():
    assert cors_origins(["HTTPS://App.example"]) == ("https://app.example",)


def test_heads_that_are_too_large(start):
    server = start()
    many = "".join(f"X-{i}: a\r\n" for i in range(MAX_HEADERS))
    for head in (f"{many}", "X-Long: " + "a" * 70_000 + "\r\n"):
        reply = server.raw(f"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{head}\r\n".encode())
        assert reply.startswith(b"HTTP/1.1 431 ")
        assert b'"code":"HEADERS_TOO_LARGE"' in reply.replace(b": ", b":")


def test_who_asks_is_told_to_the_engine(start):
    for options, headers, client in [
        ({}, {}, "127.0.0.1"),
        ({"api_keys": ("k",)}, KEY, "key-8254c329"),
    ]:
        server = start(**options)
        server.ask("POST", INFERENCE, {"prompt": "p"}, headers)
        assert server.worker.requests[0].client == client
