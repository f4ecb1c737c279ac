"""What a client shows to a server, and asks of it: a token, certificates. And the channel that carries them."""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import grpc

from matvae_client._errors import InvalidRequestError
from matvae_client._files import PathLike

_TOKEN = re.compile(r"[\x21-\x7e]+")  # what metadata can carry, and no space, which would end it
_HOST_PORT = re.compile(r"(\[[^\[\]\s]+\]|[^\s:/\[\]]+):[0-9]{1,5}")
_SCHEMES = ("dns:", "unix:", "unix-abstract:", "ipv4:", "ipv6:", "vsock:", "xds:", "google-c2p:")  # gRPC's own
_LAST_PORT = 65535
_SYSTEM_ROOTS = Path("/etc/ssl/certs/ca-certificates.crt")


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Credentials:
    """How to reach a server that does not take everybody.

    `token` is a bearer token. `ca` is a PEM file with the authorities that may have signed the server's certificate;
    None: those of the system. `cert` and `key` are PEM files, what the client shows where the server asks for
    a certificate (mutual TLS). Any of them but the token means TLS, as `tls` does alone. `server_name` is the name in
    the server's certificate where it is not that of the address. Neither token nor key stands in its repr.

        EmbeddingClient("embed.example.org:443", credentials=Credentials(tls=True, token="..."))

    Raises InvalidRequestError for what cannot be; the files are read by the client that is given it.
    """

    token: str | None = None
    ca: PathLike | None = None
    cert: PathLike | None = None
    key: PathLike | None = None
    server_name: str | None = None
    tls: bool = False

    def __post_init__(self) -> None:
        if self.token is not None and not _TOKEN.fullmatch(self.token):
            raise InvalidRequestError.of("token", "it is empty, or more than printable ASCII without spaces")
        if (self.cert is None) != (self.key is None):
            raise InvalidRequestError.of("cert", "cert and key go together: give both or neither")
        if self.ca is not None or self.cert is not None:
            object.__setattr__(self, "tls", True)
        if self.server_name is not None and not self.tls:
            raise InvalidRequestError.of("server_name", "only TLS checks it: give ca, or tls=True")

    def __repr__(self) -> str:
        shown = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        hidden = {name: "hidden" for name in ("token", "key") if shown[name] is not None}
        return f"Credentials({', '.join(f'{name}={value!r}' for name, value in (shown | hidden).items() if value)})"

    @classmethod
    def from_environment(cls, **given: Any) -> Self:
        """What MATVAE_TOKEN, MATVAE_CA, MATVAE_CERT, MATVAE_KEY, MATVAE_SERVER_NAME and MATVAE_TLS=1 say.

        What is `given`, by the name of its field, wins.
        """
        names = ("token", "ca", "cert", "key", "server_name")
        found: dict[str, Any] = {name: os.environ.get(f"MATVAE_{name.upper()}") or None for name in names}
        found["tls"] = os.environ.get("MATVAE_TLS", "") not in ("", "0")
        return cls(**found | given)


def read_token(path: PathLike) -> str:
    """The first token of a file: one a line; blank lines and those that start with # do not count.

    Raises OSError, and InvalidRequestError where there is none.
    """
    for line in Path(path).read_text(encoding="ascii", errors="replace").splitlines():
        if (token := line.strip()) and not token.startswith("#"):
            return token
    raise InvalidRequestError.of("token_file", f"{os.fspath(path)} holds no token: write one on a line of its own")


def open_channel(
    target: str, credentials: Credentials | None, options: Sequence[tuple[str, str | int]]
) -> grpc.Channel:
    """A channel to `target` that carries `credentials`. Raises InvalidRequestError, naming the field."""
    credentials = credentials or Credentials()
    if credentials.server_name is not None:
        options = (*options, ("grpc.ssl_target_name_override", credentials.server_name))
    if is_loopback(target):
        options = (*options, ("grpc.enable_http_proxy", 0))  # a proxy would take images and token off this machine
    elif credentials.token is not None and not credentials.tls:
        raise InvalidRequestError.of(
            "credentials",
            f"a token would travel to {target} in plaintext, for anybody to read: give ca (--ca), or tls=True "
            "(--tls) where an authority of the system has signed the server's certificate",
        )
    channel = (
        grpc.secure_channel(target, _tls(credentials), options)
        if credentials.tls
        else grpc.insecure_channel(target, options)
    )
    return channel if credentials.token is None else _TokenChannel(channel, credentials.token)


def check_target(target: str) -> None:
    """Raise InvalidRequestError unless `target` is HOST:PORT, or has a scheme that gRPC knows."""
    if not isinstance(target, str) or not target.strip():
        raise InvalidRequestError.of("target", f"{target!r} is no address: give HOST:PORT")
    if target.startswith(_SCHEMES):
        return
    if not _HOST_PORT.fullmatch(target) or int(target.rpartition(":")[2]) > _LAST_PORT:
        raise InvalidRequestError.of(
            "target", f"{target!r} is not HOST:PORT, such as localhost:50051, or HOST:443 behind an ingress"
        )


def proxy_variable(target: str) -> str:
    """The variable of the environment by which gRPC may send calls to `target` through a proxy; empty without one.

    gRPC reads more into no_proxy than the ends of names, such as networks: where it does, this names too much.
    """
    name = _first_set("grpc_proxy", "https_proxy", "http_proxy")
    if not name or not os.environ[name] or is_loopback(target):
        return ""
    host = target.rpartition(":")[0].rpartition("/")[2].strip("[]").lower()
    spared = os.environ.get(_first_set("no_grpc_proxy", "no_proxy"), "").lower().replace(" ", "")
    return "" if host.endswith(tuple(filter(None, spared.split(",")))) else name


def _first_set(*names: str) -> str:
    """The first of these variables of the environment that is set; empty where none is."""
    return next((name for name in names if name in os.environ), "")


def is_loopback(target: str) -> bool:
    """Whether a gRPC target is on this machine whatever a name server says."""
    scheme, colon, rest = target.partition(":")
    if scheme in ("unix", "unix-abstract"):
        return True
    if scheme == "dns" and colon:
        target = rest.removeprefix("///")  # //SERVER/NAME asks a name server of its own: no name here
    elif scheme in ("ipv4", "ipv6") and colon:
        return all(is_loopback(address) for address in rest.split(","))
    host = target[1:].partition("]")[0] if target.startswith("[") else target
    if host.count(":") == 1:
        host = host.partition(":")[0]
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _tls(credentials: Credentials) -> grpc.ChannelCredentials:
    """gRPC takes any bytes, and fails at each call; so the files are checked here."""
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if credentials.ca is None:
        roots = _system_roots()
    else:
        roots = _read("ca", credentials.ca)
        try:
            context.load_verify_locations(cafile=credentials.ca)
        except ssl.SSLError as error:
            raise InvalidRequestError.of("ca", f"{credentials.ca} holds no certificate in PEM ({error})") from None
    if credentials.cert is None or credentials.key is None:
        return grpc.ssl_channel_credentials(roots)
    chain, key = _read("cert", credentials.cert), _read("key", credentials.key)
    try:
        context.load_cert_chain(credentials.cert, credentials.key, password=lambda: "")
    except ssl.SSLError as error:
        raise InvalidRequestError.of(
            "key",
            f"{credentials.key} is not the private key of {credentials.cert}, in PEM without a passphrase ({error})",
        ) from None
    return grpc.ssl_channel_credentials(roots, key, chain)


def _system_roots() -> bytes | None:
    """The authorities of the system; None, which is those that gRPC brings, where it keeps them elsewhere."""
    import ssl

    known = ssl.get_default_verify_paths().cafile  # SSL_CERT_FILE has its say in it
    for path in (known and Path(known), _SYSTEM_ROOTS):
        if path and path.is_file():
            return path.read_bytes()
    return None


def _read(field: str, path: PathLike) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InvalidRequestError.of(field, f"cannot read {os.fspath(path)}: {error.strerror}") from None


class _TokenChannel(grpc.Channel):
    """A channel that puts the token into the metadata of every call.

    What gRPC has for it will not do. Call credentials start a thread for each call, and do not work without TLS. An
    intercepted channel looks the method up for each call, and crashes the process if it has been closed.
    """

    def __init__(self, channel: grpc.Channel, token: str) -> None:
        self._channel = channel
        self._bearer = (("authorization", f"Bearer {token}"),)

    def unary_unary(self, *arguments: Any, **options: Any) -> Any:
        return _TokenCall(self._channel.unary_unary(*arguments, **options), self._bearer)

    def unary_stream(self, *arguments: Any, **options: Any) -> Any:
        return _TokenCall(self._channel.unary_stream(*arguments, **options), self._bearer)

    def stream_unary(self, *arguments: Any, **options: Any) -> Any:
        return _TokenCall(self._channel.stream_unary(*arguments, **options), self._bearer)

    def stream_stream(self, *arguments: Any, **options: Any) -> Any:
        return _TokenCall(self._channel.stream_stream(*arguments, **options), self._bearer)

    def subscribe(self, callback: Any, try_to_connect: bool | None = False) -> None:
        self._channel.subscribe(callback, bool(try_to_connect))

    def unsubscribe(self, callback: Any) -> None:
        self._channel.unsubscribe(callback)

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _TokenCall:
    """One method of such a channel, called in any of gRPC's ways."""

    def __init__(self, method: Any, bearer: tuple[tuple[str, str], ...]) -> None:
        self._method = method
        self._bearer = bearer

    def __call__(self, request: Any, timeout: float | None = None, metadata: Any = None, **options: Any) -> Any:
        return self._method(request, timeout, metadata=(*(metadata or ()), *self._bearer), **options)

    def with_call(self, request: Any, timeout: float | None = None, metadata: Any = None, **options: Any) -> Any:
        return self._method.with_call(request, timeout, metadata=(*(metadata or ()), *self._bearer), **options)

    def future(self, request: Any, timeout: float | None = None, metadata: Any = None, **options: Any) -> Any:
        return self._method.future(request, timeout, metadata=(*(metadata or ()), *self._bearer), **options)
