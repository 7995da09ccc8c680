"""Certificates: what is said of those that will not do, and reading them again."""

import contextlib
import socket
import ssl
import time

import pytest
import trustme

from rbee_worker.config import ServerConfig
from rbee_worker.errors import InvalidRequest
from rbee_worker.server.http.tls import Certificate, certificate


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture
def issue(authority, tmp_path):
    """Writes a new certificate and its key; returns both paths."""

    def write(name="worker"):
        issued = authority.issue_cert("localhost")
        cert, key = tmp_path / f"{name}.pem", tmp_path / f"{name}.key"
        cert.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        key.write_bytes(issued.private_key_pem.bytes())
        return cert, key

    return write


def presented(context, authority):
    """The serial number of the certificate that a client is shown."""
    client = ssl.create_default_context()
    authority.configure_trust(client)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = context.wrap_bio(incoming, outgoing, server_side=True)
    client_in, client_out = ssl.MemoryBIO(), ssl.MemoryBIO()
    peer = client.wrap_bio(client_in, client_out, server_hostname="localhost")
    for _ in range(6):
        for side in (peer, server):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
            incoming.write(client_out.read())
            client_in.write(outgoing.read())
    return peer.getpeercert()["serialNumber"], peer.selected_alpn_protocol()


def test_two_files_or_one(issue, authority, tmp_path):
    cert, key = issue()
    serial, _ = presented(Certificate(cert, key).context, authority)
    both = tmp_path / "both.pem"
    both.write_bytes(key.read_bytes() + cert.read_bytes())
    assert presented(Certificate(both, None).context, authority)[0] == serial


def test_old_versions_of_tls_are_not_spoken(issue):
    assert Certificate(*issue()).context.minimum_version >= ssl.TLSVersion.TLSv1_2


def encrypt(key, password):
    from cryptography.hazmat.primitives import serialization as s

    loaded = s.load_pem_private_key(key.read_bytes(), None)
    how = s.BestAvailableEncryption(password.encode())
    key.write_bytes(loaded.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, how))


def test_an_encrypted_key(issue, authority):
    cert, key = issue()
    encrypt(key, "secret")
    assert presented(Certificate(cert, key, "secret").context, authority)
    with pytest.raises(InvalidRequest, match="is encrypted") as raised:
        Certificate(cert, key)
    assert "RBEE_TLS_KEY_PASSWORD" in raised.value.hint
    with pytest.raises(InvalidRequest, match="cannot be decrypted"):
        Certificate(cert, key, "wrong")


def test_what_will_not_do(issue, tmp_path):
    cert, key = issue()
    _, other = issue("other")
    nothing = tmp_path / "nothing.pem"
    noise = tmp_path / "noise.pem"
    noise.write_bytes(b"\x30\x82 DER")
    broken = tmp_path / "broken.pem"
    broken.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    for pair, message in [
        ((nothing, key), f"--tls-cert {nothing}: No such file"),
        ((cert, nothing), f"--tls-key {nothing}: No such file"),
        ((noise, key), f"--tls-cert {noise}: not a PEM file"),
        ((cert, other), "the key is not that of the certificate"),
        ((cert, None), "no certificate with its key"),
        ((broken, key), "no certificate with its key"),
    ]:
        with pytest.raises(InvalidRequest) as raised:
            Certificate(*pair)
        assert message in raised.value.message
        assert raised.value.exit_code == 2


def test_by_configuration(issue):
    cert, key = issue()
    assert certificate(ServerConfig()) is None
    assert certificate(ServerConfig(tls_cert=cert, tls_key=key)) is not None
    with pytest.raises(InvalidRequest, match="--tls-key without --tls-cert"):
        certificate(ServerConfig(tls_key=key))


def test_reading_again(issue, authority):
    cert, key = issue()
    ours = Certificate(cert, key)
    before = presented(ours.context, authority)
    issue()  # over the same files
    ours.reload()
    renewed = presented(ours.context, authority)
    assert renewed[0] != before[0]
    key.write_text("-----BEGIN nothing")
    with pytest.raises(InvalidRequest):
        ours.reload()
    assert presented(ours.context, authority) == renewed


@pytest.mark.parametrize("request_", [b"", b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"], ids=["silent", "idle"])
def test_a_connection_that_is_closed_does_not_wait_for_its_client(issue, authority, start, request_):
    cert, key = issue()
    server = start(tls_cert=cert, tls_key=key, header_seconds=1, idle_seconds=1)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    with server.connect() as sock, client.wrap_socket(sock, server_hostname="localhost") as encrypted:
        encrypted.sendall(request_)
        began = time.monotonic()
        with socket.socket(fileno=encrypted.fileno()) as below:  # who reads here leaves every goodbye unanswered
            below.settimeout(60)
            while below.recv(4096):
                pass
            below.detach()
        assert time.monotonic() - began < 20  # TLS itself would wait for 30 s


def test_a_password_is_not_shown():
    assert "secret" not in repr(ServerConfig(api_keys=("secret",), tls_key_password="secret"))  # noqa: S106 - a test's
