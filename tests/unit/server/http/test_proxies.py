"""Whose word of the client's address is taken, and what becomes of it."""

import logging

import pytest

from rbee_worker.config import ServerConfig
from rbee_worker.errors import InvalidRequest
from rbee_worker.server.app import create_app
from rbee_worker.server.http.proxies import proxy_networks


@pytest.fixture
def client(start, caplog):
    """The client that the log names, for the headers of a request from 127.0.0.1."""

    def ask(forwarded, **config):
        caplog.clear()
        caplog.set_level(logging.INFO, "rbee_worker.access")
        server = start(**config)
        headers = {"X-Forwarded-For": forwarded} if forwarded else {}
        assert server.ask("GET", "/v1/worker", headers=headers).status == 200
        server.wait(lambda: [record for record in caplog.records if record.name == "rbee_worker.access"])
        (record,) = (record for record in caplog.records if record.name == "rbee_worker.access")
        return record.client

    return ask


@pytest.mark.parametrize("proxy", ["127.0.0.1", "127.0.0.0/8"])
def test_a_trusted_proxy_tells_who_asks(client, proxy):
    assert client("198.51.100.9, 203.0.113.7", trusted_proxies=(proxy,)) == "203.0.113.7"
    assert client("198.51.100.9, 203.0.113.7, 127.0.0.1", trusted_proxies=(proxy,)) == "203.0.113.7"
    assert client("2001:db8::1", trusted_proxies=(proxy,)) == "2001:db8::1"
    assert client(None, trusted_proxies=(proxy,)) == "127.0.0.1"


def test_nobody_else_does(client):
    assert client("203.0.113.7") == "127.0.0.1"
    assert client("203.0.113.7", trusted_proxies=("10.0.0.0/8",)) == "127.0.0.1"


@pytest.mark.parametrize("words", ["nobody", "\x1b[31mred", "a" * 5000, "203.0.113.7 x"])
def test_words_that_are_no_address_are_not_repeated(client, words):
    assert client(words, trusted_proxies=("127.0.0.1",)) == "unknown"


def test_ipv4_is_known_as_a_socket_of_both_families_shows_it():
    assert proxy_networks(["10.0.0.0/8", "192.0.2.1", "2001:db8::/32"]) == [
        "10.0.0.0/8",
        "::ffff:10.0.0.0/104",
        "192.0.2.1/32",
        "::ffff:192.0.2.1/128",
        "2001:db8::/32",
    ]


@pytest.mark.parametrize("value", ["proxy.example.org", "*", "", "10.0.0.1/8", "10.0.0.0/33"])
def test_what_is_no_address_is_refused_at_start(value, stand_in):
    with pytest.raises(InvalidRequest, match=r"--trusted-proxy .* is no address") as raised:
        create_app(stand_in.Worker([]), ServerConfig(trusted_proxies=(value,)))
    assert "10.0.0.0/8" in raised.value.hint
