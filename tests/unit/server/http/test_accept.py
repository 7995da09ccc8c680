"""Crowds: who is served, who gives way, and what is left for probes."""

import contextlib
import errno
import ssl

import pytest
import trustme

from rbee_worker.server.http.protocol import ConnectionLimits


def is_cut(sock):
    """Whether the connection ends without an answer."""
    with contextlib.suppress(ConnectionError):
        return sock.recv(100) == b""
    return True


@pytest.fixture
def full(start, stand_in):
    """A server whose two places are taken by streams, and that answers two more."""
    worker = stand_in.Worker([stand_in.started(), stand_in.HANG])
    server = start(worker, max_connections=2, spare=2)
    streams = [server.open("POST", "/v1/inference", {"prompt": "p"}) for _ in range(2)]
    for stream in streams:
        stream.read_until(b"started")
    yield server
    for job_id in ("job-1", "job-2"):
        worker.cancel(job_id)
    for stream in streams:
        assert stream.finish().frames[-1] == b"data: [DONE]"
    server.wait(lambda: len(server.server.server_state.connections) < 2)
    assert server.ask("GET", "/v1/worker").status == 200


def test_a_crowd_is_turned_away_but_probes_are_answered(full):
    refused = full.ask("GET", "/v1/worker")
    assert (refused.status, refused.json["error"]["code"]) == (503, "UNAVAILABLE")
    assert (refused.headers["retry-after"], refused.headers["connection"]) == ("1", "close")
    assert full.ask("GET", "/livez").status == 200


def test_probes_are_answered_also_where_the_rest_is_silent(full):
    silent = [full.connect() for _ in range(5)]
    for _ in range(3):
        assert full.ask("GET", "/livez").status == 200
    assert is_cut(silent[0])
    for sock in silent:
        sock.close()


def test_who_has_been_silent_longest_gives_way(start):
    server = start(max_connections=3, spare=1)
    silent = []
    for _ in range(3):
        silent.append(server.connect())
        server.wait(lambda: len(server.server.server_state.connections) == len(silent))
    server.wait(lambda: server.ask("GET", "/v1/worker").status == 200)  # with patience
    assert is_cut(silent[0])
    for sock in silent[1:]:
        sock.sendall(b"GET /v1/worker HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert sock.recv(100).startswith(b"HTTP/1.1 200 ")
    for sock in silent:
        sock.close()


def test_where_all_are_busy_the_next_one_waits(start, stand_in):
    worker = stand_in.Worker([stand_in.started(), stand_in.HANG])
    server = start(worker, max_connections=2, spare=0)
    streams = [server.open("POST", "/v1/inference", {"prompt": "p"}) for _ in range(2)]
    for stream in streams:
        stream.read_until(b"started")
    with server.connect() as late:
        late.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        late.settimeout(0.2)
        with pytest.raises(TimeoutError):
            late.recv(1)
        worker.cancel("job-1")
        streams[0].finish()
        late.settimeout(10)
        assert late.recv(100).startswith(b"HTTP/1.1 200 ")
    streams[1].leave()


@pytest.fixture
def encrypted(start, tmp_path):
    """A server with TLS that answers two connections, and its clients' context."""
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    file = tmp_path / "worker.pem"
    issued.private_key_and_cert_chain_pem.write_to_path(file)
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return lambda **config: (start(tls_cert=file, max_connections=1, spare=1, **config), context)


def livez(server, context):
    with server.connect() as sock, context.wrap_socket(sock, server_hostname="localhost") as client:
        client.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        return client.recv(100)


def test_a_handshake_counts_as_a_connection(encrypted):
    server, context = encrypted()
    silent = [server.connect() for _ in range(4)]
    for sock in silent[:2]:
        assert is_cut(sock)
    assert livez(server, context).startswith(b"HTTP/1.1 200 ")
    for sock in silent:
        sock.close()


def test_a_handshake_ends_within_the_time_for_a_head(encrypted):
    server, _ = encrypted(header_seconds=0.2)
    with server.connect() as silent:
        assert is_cut(silent)


def test_what_speaks_no_tls_is_cut_and_leaves_no_trace(encrypted, caplog):
    server, context = encrypted()
    with server.connect() as plain:
        plain.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert is_cut(plain)
    assert livez(server, context).startswith(b"HTTP/1.1 200 ")
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_without_descriptors_it_is_told_once_and_goes_on(start, monkeypatch, caplog):
    server = start()
    loop = server.server._loop
    accept, failures = loop.sock_accept, [errno.EMFILE] * 5

    async def failing(sock):
        if failures:
            raise OSError(failures.pop(), "Too many open files")
        return await accept(sock)

    assert server.ask("GET", "/livez").status == 200
    monkeypatch.setattr(loop, "sock_accept", failing)
    assert server.ask("GET", "/livez").status == 200  # was accepted by the call before
    assert server.ask("GET", "/livez").status == 200
    assert not failures
    told = [record for record in caplog.messages if "Too many open files" in record]
    assert len(told) == 1
    assert "--max-connections" in told[0]


@pytest.mark.parametrize(
    ("files", "connections", "spare"),
    [(100_000, 4096, 256), (4480, 4096, 256), (1024, 672, 224), (40, 8, 2), (4, 1, 1)],
)
def test_the_limits_leave_room_for_other_files(files, connections, spare):
    limits = ConnectionLimits(4096, 20.0).within(files)
    assert (limits.connections, limits.spare) == (connections, spare)
    assert limits.connections + limits.spare <= max(files, 2)
