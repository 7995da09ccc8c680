"""Which addresses are bound, and what is said when that fails."""

import socket

import pytest

from rbee_worker.config import ServerConfig
from rbee_worker.errors import InvalidRequest, RbeeError
from rbee_worker.server.http.listen import Address, listen, url


def closing(sockets):
    for sock in sockets:
        sock.close()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "255.255.255.255"])  # noqa: S104 - refused
def test_without_a_key_only_loopback_is_bound(host):
    with pytest.raises(InvalidRequest, match="no API key is set") as raised:
        listen(ServerConfig(host=host, port=0))
    assert raised.value.exit_code == 2
    assert "--api-key" in raised.value.hint
    assert "--allow-unauthenticated" in raised.value.hint


@pytest.mark.parametrize("options", [{"api_keys": ("k",)}, {"allow_unauthenticated": True}])
def test_with_a_key_or_leave_any_address_is_bound(options):
    closing(listen(ServerConfig(host="0.0.0.0", port=0, **options)))  # noqa: S104 - and closed at once


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.2"])
def test_port_0_takes_a_free_port_and_accepts_at_once(host):
    sockets = listen(ServerConfig(host=host, port=0))
    port = sockets[0].getsockname()[1]
    assert port > 0
    assert url(sockets).endswith(f":{port}")
    socket.create_connection(sockets[0].getsockname()[:2], timeout=5).close()
    closing(sockets)


def has_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize(("host", "both"), [("::", True), ("::1", False)])
def test_one_ipv6_address_for_all_takes_ipv4_too(host, both):
    sockets = listen(ServerConfig(host=host, port=0, allow_unauthenticated=True))
    port = sockets[0].getsockname()[1]
    assert url(sockets) == f"http://[{host}]:{port}"
    socket.create_connection(("::1", port), timeout=5).close()
    if both:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    closing(sockets)


def test_a_port_that_is_taken():
    first = listen(ServerConfig(port=0))
    port = first[0].getsockname()[1]
    with pytest.raises(RbeeError, match=rf"127\.0\.0\.1:{port} is taken") as raised:
        listen(ServerConfig(port=port))
    assert raised.value.exit_code == 1
    assert "--addr" in raised.value.hint
    closing(first)
    closing(listen(ServerConfig(port=port)))  # and it is free again at once


def test_where_one_of_several_addresses_is_taken_none_is_kept(monkeypatch):
    taken = listen(ServerConfig(host="127.0.0.2", port=0))
    port = taken[0].getsockname()[1]
    both = [Address(socket.AF_INET, ip, (ip, port)) for ip in ("127.0.0.1", "127.0.0.2")]
    monkeypatch.setattr("rbee_worker.server.http.listen._resolve", lambda *_: both)
    with pytest.raises(RbeeError, match=rf"127\.0\.0\.2:{port} is taken"):
        listen(ServerConfig(host="localhost", port=port))
    monkeypatch.undo()
    closing(listen(ServerConfig(port=port)))  # the other one is free
    closing(taken)


def test_a_name_that_no_one_knows():
    with pytest.raises(InvalidRequest, match=r"nobody\.invalid"):
        listen(ServerConfig(host="nobody.invalid", port=0))


def test_an_address_of_another_machine():
    with pytest.raises(RbeeError, match="cannot be bound") as raised:
        listen(ServerConfig(host="192.0.2.1", port=0, allow_unauthenticated=True))
    assert raised.value.exit_code == 1
