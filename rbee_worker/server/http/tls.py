"""The server's certificate. It is read and checked before anything listens, and again on SIGHUP."""

import ssl
from pathlib import Path

from rbee_worker.config import ServerConfig
from rbee_worker.errors import InvalidRequest

PASSWORD_VARIABLE = "RBEE_TLS_KEY_PASSWORD"  # noqa: S105 - the variable's name
"""The environment variable with the password of an encrypted key. Others could read it on a command line."""

_ENCRYPTED = (b"BEGIN ENCRYPTED PRIVATE KEY", b"Proc-Type: 4,ENCRYPTED")


class Certificate:
    """The server's certificate, and the TLS context that uses it.

    Attributes:
        context: for the server's sockets: TLS 1.2 or newer, HTTP/1.1.
    """

    def __init__(self, cert: Path, key: Path | None, password: str | None = None) -> None:
        """Read the files.

        Raises:
            InvalidRequest: a file is missing, cannot be read or is not PEM, the files do not belong together, or the
                password is missing or wrong.
        """
        self._cert = cert
        self._key = key
        self._password = password
        self.context = self._read()

    def reload(self) -> None:
        """Read the files again, for new connections. If that fails, the old certificate stays.

        Raises:
            InvalidRequest: as at start.
        """
        self._read()
        self._load_into(self.context)

    def _read(self) -> ssl.SSLContext:
        for option, path in (("--tls-cert", self._cert), ("--tls-key", self._key)):
            if path is not None:
                _read_pem(option, path)
        key = self._key or self._cert
        encrypted = any(mark in _read_pem("--tls-key", key) for mark in _ENCRYPTED)
        if encrypted and not self._password:
            raise InvalidRequest(f"--tls-key {key}: the key is encrypted.", hint=f"Set {PASSWORD_VARIABLE}.")
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.set_alpn_protocols(["http/1.1"])
        try:
            self._load_into(context)
        except (OSError, ValueError) as error:
            raise self._explained(error, encrypted=encrypted) from None
        return context

    def _load_into(self, context: ssl.SSLContext) -> None:
        # An empty password keeps the library from asking for one on the terminal.
        context.load_cert_chain(self._cert, self._key, password=self._password or "")

    def _explained(self, error: Exception, *, encrypted: bool) -> InvalidRequest:
        reason = getattr(error, "reason", None) or str(error)
        files = f"--tls-cert {self._cert}" + (f", --tls-key {self._key}" if self._key else "")
        if reason == "KEY_VALUES_MISMATCH":
            return InvalidRequest(
                f"{files}: the key is not that of the certificate.",
                hint="Give the two that were made together; the server's own certificate comes first in its file.",
            )
        if encrypted:
            return InvalidRequest(f"{files}: the key cannot be decrypted.", hint=f"Check {PASSWORD_VARIABLE}.")
        hint = "Both must be PEM; without --tls-key the certificate's file must hold the key too."
        return InvalidRequest(f"{files}: no certificate with its key ({reason}).", hint=hint)


def certificate(config: ServerConfig) -> Certificate | None:
    """The certificate of the configuration; None: it has none, so the server uses plain HTTP.

    Raises:
        InvalidRequest: there is a key without a certificate, or as :class:`Certificate`.
    """
    if config.tls_cert is not None:
        return Certificate(config.tls_cert, config.tls_key, config.tls_key_password)
    if config.tls_key is not None:
        raise InvalidRequest("--tls-key without --tls-cert.", hint="Give the certificate too.")
    return None


def _read_pem(option: str, path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{option} {path}: {error.strerror or error}.") from None
    if b"-----BEGIN " not in content:
        raise InvalidRequest(f"{option} {path}: not a PEM file.", hint="Convert it: openssl x509 -in FILE -outform PEM")
    return content
