"""Who may call: certificates from files, and bearer tokens from a file that is read again when it changes.

A secret that stands in a file never leaves this module: no message, no log line and no repr has one.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import os
import re
import ssl
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health

from matvae_server.calls import Observer, refuse
from matvae_server.config import Security
from matvae_server.errors import UnauthenticatedError
from matvae_server.public import REFLECTION

OPEN_SERVICES = (health.SERVICE_NAME, *REFLECTION)
"""What a caller without a token may still ask: whether the server lives, and what it speaks."""

_OPEN_PATHS = tuple(f"/{name}/" for name in OPEN_SERVICES)
_LOOK_SECONDS = 1.0
"""How often at most the token file is looked at; a token that was taken out of it may live on for as long."""
_OUT_OF_TIME = (9, 10)  # OpenSSL's X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED
_TOKEN = re.compile(rb"[\x21-\x7e]+")  # what metadata can carry, and no space, which would end it

log = logging.getLogger("matvae.server")


class SecurityError(RuntimeError):
    """A file that the security depends on cannot be used; the message names it and its flag."""


def credentials(security: Security) -> grpc.ServerCredentials | None:
    """TLS as the settings want it, with client certificates where they name an authority; None for plaintext.

    Raises SecurityError. gRPC itself takes any bytes, and fails when the first client comes.
    """
    cert, key, client_ca = security.tls_cert, security.tls_key, security.tls_client_ca
    if cert is None or key is None:
        return None
    chain, private = _read(cert, "--tls-cert"), _read(key, "--tls-key")
    _check_certificates(cert, "--tls-cert")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(cert, key, password=_no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise SecurityError(f"--tls-key {key} is not the key of --tls-cert {cert}") from None
        raise SecurityError(f"--tls-key {key} is no private key in PEM without a passphrase ({error})") from None
    if why := _not_valid_now(cert, context):
        log.warning("--tls-cert %s: clients will refuse it: %s", cert, why)
    authority = None
    if client_ca is not None:
        authority = _read(client_ca, "--tls-client-ca")
        _check_certificates(client_ca, "--tls-client-ca")
    return grpc.ssl_server_credentials(
        [(private, chain)], root_certificates=authority, require_client_auth=authority is not None
    )


class Tokens:
    """The bearer tokens of a file: one a line; blank lines and those that start with # do not count.

    Raises SecurityError where there is none. A file that later becomes unreadable or empty changes nothing: the tokens
    that were read last go on, and the log says so. `clock` is in seconds.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._looked = clock()
        self._seen = self._look()
        self._digests = self._load()

    def __repr__(self) -> str:
        return f"Tokens({str(self._path)!r})"

    def admits(self, token: str) -> bool:
        """Whether it is one of them. How long that takes says nothing of the tokens: all are compared, as digests."""
        self._refresh()
        offered, known = hashlib.sha256(token.encode()).digest(), False
        for digest in self._digests:
            known |= hmac.compare_digest(offered, digest)
        return known

    def check(self, metadata: Iterable[tuple[str, Any]]) -> None:
        """Raises UnauthenticatedError unless a call's metadata bear one of them."""
        token = bearer(metadata)
        if token is not None and self.admits(token):
            return
        said = "no token came with the call" if token is None else "the token is not one of this server's"
        raise UnauthenticatedError(f"{said}: it goes into the metadata as `authorization: Bearer TOKEN`")

    def _refresh(self) -> None:
        now = self._clock()
        if now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        seen = self._look()  # before the file is read: what is written meanwhile differs from it
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._digests = self._load()
        except SecurityError as error:
            log.error("the tokens stay as they were: %s", error)  # noqa: TRY400 - the message says it all
        else:
            log.info("read %d tokens from %s", len(self._digests), self._path)

    def _look(self) -> tuple[int, ...] | None:
        """What differs once the file has changed, or another has its place; ctime, for rights that were granted."""
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino

    def _load(self) -> tuple[bytes, ...]:
        lines = [line.strip() for line in _read(self._path, "--token-file").splitlines()]
        digests = []
        for number, line in enumerate(lines, 1):
            if not line or line.startswith(b"#"):
                continue
            if not _TOKEN.fullmatch(line):
                raise SecurityError(
                    f"--token-file {self._path}: line {number} is no token, which is printable ASCII without spaces"
                )
            digests.append(hashlib.sha256(line).digest())
        if not digests:
            raise SecurityError(f"--token-file {self._path} holds no token: write one on a line of its own")
        return tuple(digests)


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Lets calls through that bear a token, and those of the open services.

    Any other, also of a method that does not exist, is UNAUTHENTICATED before its message is received. `observers` are
    told of those that are refused.
    """

    def __init__(self, tokens: Tokens, observers: Sequence[Observer] = ()) -> None:
        self._tokens = tokens
        self._observers = observers

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        """See grpc.aio.ServerInterceptor."""
        if details.method.startswith(_OPEN_PATHS):
            return await continuation(details)
        try:
            self._tokens.check(details.invocation_metadata)
        except UnauthenticatedError as error:
            refusal = error.with_traceback(None)  # which would hold this frame, and the frame it
        else:
            return await continuation(details)

        async def end(_requests: Any, context: Any) -> None:
            refuse(context, details.method, refusal, self._observers)

        # Of a stream nothing is received until its handler asks: so nobody unknown makes us take 16 MiB, and parse it.
        return grpc.stream_stream_rpc_method_handler(end)


def interceptors(security: Security, observers: Sequence[Observer] = ()) -> tuple[TokenInterceptor, ...]:
    """What a server needs to refuse strangers; nothing where no token file is given. Raises SecurityError."""
    return (TokenInterceptor(Tokens(security.token_file), observers),) if security.token_file else ()


def bearer(metadata: Iterable[tuple[str, Any]]) -> str | None:
    """The token that metadata bear, where it is the only one."""
    offered = [value for key, value in metadata if key == "authorization"]
    if len(offered) != 1 or not isinstance(offered[0], str):
        return None
    scheme, _, token = offered[0].partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def _read(path: Path, flag: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SecurityError(f"cannot read {flag} {path}: {error.strerror or os.strerror(error.errno or 0)}") from None


def _check_certificates(path: Path, flag: str) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cafile=path)
    except ssl.SSLError as error:
        raise SecurityError(f"{flag} {path} holds no certificate in PEM ({error})") from None


def _not_valid_now(cert: Path, server: ssl.SSLContext) -> str | None:
    """Why the certificate is out of its time, where it is: what a client says that trusts just it, in memory."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
    client.load_verify_locations(cafile=cert)
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (client.wrap_bio(to_client, to_server), server.wrap_bio(to_server, to_client, server_side=True))
    try:
        for _ in range(2):
            for end in ends:
                with contextlib.suppress(ssl.SSLWantReadError):
                    end.do_handshake()
    except ssl.SSLCertVerificationError as error:
        if error.verify_code in _OUT_OF_TIME:
            return error.verify_message
    except ssl.SSLError:  # something else than time, of which a client will tell
        pass
    return None


def _no_password() -> str:
    """Else OpenSSL would ask for one on the terminal, which gRPC could not use."""
    return ""
