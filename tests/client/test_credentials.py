"""A client of servers with TLS, client certificates and tokens: real processes, real handshakes."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import trustme

from matvae_bench.images import LabelledImages
from matvae_bench.server_process import ServerProcess
from matvae_client import (
    CodesDirectory,
    Credentials,
    EmbeddingClient,
    InvalidRequestError,
    UnauthenticatedError,
    UnavailableError,
)
from matvae_client._cli import main
from matvae_client._credentials import is_loopback, open_channel

TOKEN = "a-s3cret"


@dataclasses.dataclass(frozen=True)
class Files:
    ca: Path
    cert: Path
    key: Path
    client_cert: Path
    client_key: Path
    stranger_ca: Path
    tokens: Path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("credentials")
    made = Files(**{field.name: folder / field.name for field in dataclasses.fields(Files)})
    ours = trustme.CA()
    ours.cert_pem.write_to_path(made.ca)
    trustme.CA().cert_pem.write_to_path(made.stranger_ca)
    for leaf, cert, key in (
        (ours.issue_cert("embed.example.org"), made.cert, made.key),
        (ours.issue_cert("client@example.org"), made.client_cert, made.client_key),
    ):
        leaf.cert_chain_pems[0].write_to_path(cert)
        leaf.private_key_pem.write_to_path(key)
    made.tokens.write_text(f"# mine\n\n{TOKEN}\n")
    return made


@pytest.fixture(scope="module")
def gallery(server: ServerProcess, images: LabelledImages, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gallery") / "photos"
    with EmbeddingClient(server.address) as client:
        codes = client.embed(images.gallery_images[:20])
    CodesDirectory(folder).append(dataclasses.replace(codes, ids=tuple(f"{n}" for n in range(20))))
    return folder


@pytest.fixture(scope="module")
def fortress(files: Files, gallery: Path) -> Iterator[ServerProcess]:
    """TLS, client certificates and tokens. Its certificate has another name than its address."""
    arguments = ["--tls-cert", files.cert, "--tls-key", files.key, "--tls-client-ca", files.ca]
    arguments += ["--token-file", files.tokens, "--gallery", f"photos={gallery}"]
    with ServerProcess(*map(str, arguments)) as server:
        yield server


@pytest.fixture(scope="module")
def guarded(files: Files, gallery: Path) -> Iterator[ServerProcess]:
    """Tokens, in plaintext."""
    with ServerProcess("--token-file", str(files.tokens), "--gallery", f"photos={gallery}") as server:
        yield server


@pytest.fixture
def everything(files: Files) -> Credentials:
    return Credentials(
        token=TOKEN,
        ca=files.ca,
        cert=files.client_cert,
        key=str(files.client_key),
        server_name="embed.example.org",
    )


def use_everything(client: EmbeddingClient, images: LabelledImages) -> None:
    """A unary call, futures (more images than one request holds), and streams."""
    pixels = images.gallery_images[: client.model().limits.max_images_per_request + 20]
    codes = client.embed(pixels, dimensions=8, precision="int8")
    assert len(codes) == len(pixels)
    pulled = client.pull("photos", dimensions=8, precision="int8")
    assert np.array_equal(pulled.rows, codes.rows[:20])


def test_tls_client_certificate_and_token(
    fortress: ServerProcess, everything: Credentials, images: LabelledImages
) -> None:
    with EmbeddingClient(fortress.address, credentials=everything) as client:
        use_everything(client, images)


def test_a_token_over_plaintext_to_this_machine(guarded: ServerProcess, images: LabelledImages) -> None:
    with EmbeddingClient(guarded.address, credentials=Credentials(token=TOKEN)) as client:
        use_everything(client, images)


def test_a_closed_client_says_so_with_a_token_too(guarded: ServerProcess, images: LabelledImages) -> None:
    client = EmbeddingClient(guarded.address, credentials=Credentials(token=TOKEN))
    pixels = images.gallery_images[: client.model().limits.max_images_per_request + 1]
    client.close()
    for call in (client.models, lambda: client.embed(pixels), lambda: client.pull("photos")):
        with pytest.raises(UnavailableError, match=r"this client of .* was closed: make another$"):
            call()


@pytest.mark.parametrize("secure", [True, False])
def test_every_kind_of_call_bears_the_token(
    fortress: ServerProcess, guarded: ServerProcess, everything: Credentials, secure: bool
) -> None:
    """Also those that this client does not make yet: refused for what they ask, not for who asks."""
    target, credentials = (fortress, everything) if secure else (guarded, Credentials(token=TOKEN))
    with open_channel(target.address, credentials, ()) as channel:
        service, junk = "/matvae.v1.EmbeddingService/NoSuchMethod", b""
        calls = [
            lambda: channel.unary_unary(service)(junk, timeout=30),
            lambda: channel.unary_unary(service).with_call(junk, timeout=30),
            lambda: channel.unary_unary(service).future(junk, timeout=30).result(),
            lambda: list(channel.unary_stream(service)(junk, timeout=30)),
            lambda: channel.stream_unary(service)(iter([junk]), timeout=30),
            lambda: list(channel.stream_stream(service)(iter([junk]), timeout=30)),
        ]
        for call in calls:
            with pytest.raises(grpc.RpcError) as refused:
                call()
            assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("credentials", [None, Credentials(), Credentials(token="wrong")])
def test_without_a_token_the_error_says_what_to_do(guarded: ServerProcess, credentials: Credentials | None) -> None:
    with (
        EmbeddingClient(guarded.address, credentials=credentials) as client,
        pytest.raises(UnauthenticatedError) as refused,
    ):
        client.model()
    for hint in ("Credentials(token=", "MATVAE_TOKEN", "--token-file"):
        assert hint in str(refused.value)


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"ca": "stranger_ca"}, r"its certificate is not of an authority in ca"),
        ({"server_name": None}, r"its certificate is of another name: server_name"),
        ({"cert": None, "key": None}, r"if it wants a certificate of yours, cert and key"),
        ({"ca": None, "cert": None, "key": None, "server_name": None, "tls": False, "token": None}, r"If it wants TLS"),
    ],
)
def test_a_handshake_that_fails_hints_at_tls(
    fortress: ServerProcess, files: Files, everything: Credentials, change: dict[str, str | None], hint: str
) -> None:
    changed = {field: getattr(files, str(value), value) for field, value in change.items()}
    credentials = dataclasses.replace(everything, **changed)
    with (
        EmbeddingClient(fortress.address, credentials=credentials) as client,
        pytest.raises(UnavailableError, match=hint),
    ):
        client.model()


def test_tls_to_a_server_without_it_hints_at_tls(guarded: ServerProcess, files: Files) -> None:
    with (
        EmbeddingClient(guarded.address, credentials=Credentials(ca=files.ca)) as client,
        pytest.raises(UnavailableError, match="it does not speak TLS"),
    ):
        client.model()


def test_nobody_there_does_not_hint_at_tls(faulty) -> None:
    faulty.stop()
    with (
        EmbeddingClient(faulty.address) as client,
        pytest.raises(UnavailableError, match=r"no server answers at .*: start one with matvae-serve"),
    ):
        client.model()


@pytest.mark.parametrize("target", ["embed.example.org:443", "10.0.0.1:50051", "dns:///example.org:1", "0.0.0.0:1"])
def test_a_token_never_travels_in_plaintext(target: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"a token would travel to .* in plaintext") as refused:
        EmbeddingClient(target, credentials=Credentials(token=TOKEN))
    assert TOKEN not in str(refused.value)


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A proxy that all of the environment's variables name, and that is never answered from."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(2.0)
        for name in ("no_proxy", "no_grpc_proxy", "grpc_proxy"):
            monkeypatch.delenv(name, raising=False)
        for name in ("http_proxy", "https_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{listener.getsockname()[1]}")
        yield listener


def test_no_proxy_sees_what_is_for_this_machine(proxy: socket.socket, faulty) -> None:
    with EmbeddingClient(faulty.address) as client:
        assert len(client.embed(faulty.images(1))) == 1
    faulty.stop()
    with EmbeddingClient(faulty.address, timeout=2.0) as client, pytest.raises(UnavailableError) as nobody:
        client.model()
    assert "proxy" not in str(nobody.value)
    proxy.settimeout(0.2)
    with pytest.raises(TimeoutError):
        proxy.accept()


def test_a_call_that_fails_in_a_proxy_names_it(proxy: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy.close()
    with (
        EmbeddingClient("embed.invalid:443") as client,
        pytest.raises(UnavailableError, match=r"embed\.invalid.*https_proxy may send this call through a proxy"),
    ):
        client.model()
    monkeypatch.setenv("no_proxy", "example.org, .invalid")
    with EmbeddingClient("embed.invalid:443") as client, pytest.raises(UnavailableError) as unknown:
        client.model()
    assert "proxy" not in str(unknown.value)


@pytest.mark.parametrize(
    "target", ["", " ", None, "localhost", "dns", "http://localhost:50051", "::1", "localhost:http", "localhost:1/x"]
)
def test_what_is_no_address_is_refused_at_once(target: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"^target: .*HOST:PORT"):
        EmbeddingClient(target)


@pytest.mark.parametrize(
    "target",
    ["localhost:1", "[::1]:1", "dns:///localhost:1", "dns:localhost", "ipv4:127.0.0.1:1,127.0.0.2:1", "unix:/a/socket"],
)
def test_every_address_of_grpc_is_taken(target: str) -> None:
    EmbeddingClient(target).close()


@pytest.mark.parametrize(
    ("target", "here"),
    [
        ("localhost:50051", True),
        ("localhost", True),
        ("127.0.0.1:1", True),
        ("127.8.8.8:1", True),
        ("[::1]:1", True),
        ("::1", True),
        ("dns:///localhost:1", True),
        ("dns:localhost:1", True),
        ("ipv4:127.0.0.1:1,127.0.0.2:1", True),
        ("ipv6:[::1]:1", True),
        ("unix:/run/matvae.sock", True),
        ("ipv4:127.0.0.1:1,10.0.0.1:1", False),
        ("dns://10.0.0.1/localhost:1", False),
        ("localhost.example.org:1", False),
        ("127.0.0.1.example.org:1", False),
        ("[2001:db8::1]:1", False),
        ("xds:///localhost:1", False),
        ("", False),
    ],
)
def test_what_is_this_machine(target: str, here: bool) -> None:
    assert is_loopback(target) is here


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"token": ""}, "token: it is empty"),
        ({"token": "two words"}, "token: it is empty, or more than printable ASCII without spaces"),
        ({"token": "a\nb"}, "token: "),
        ({"cert": "a"}, "cert and key go together"),
        ({"key": "a"}, "cert and key go together"),
        ({"server_name": "a"}, "server_name: only TLS checks it"),
        ({"ca": "missing"}, "ca: cannot read missing: No such file"),
        ({"ca": "key"}, "ca: .*key holds no certificate in PEM"),
        ({"cert": "client_cert", "key": "key"}, "key: .*key is not the private key of .*client_cert"),
        ({"cert": "missing", "key": "key"}, "cert: cannot read missing"),
    ],
)
def test_what_cannot_be_is_refused_at_once(files: Files, fields: dict[str, str], says: str) -> None:
    named = {field: getattr(files, value, value) for field, value in fields.items()}
    with pytest.raises(InvalidRequestError, match=says):
        EmbeddingClient("localhost:1", credentials=Credentials(**named))


def test_a_channel_of_ones_own_has_its_own_credentials() -> None:
    with (
        grpc.insecure_channel("localhost:1") as channel,
        pytest.raises(InvalidRequestError, match="a channel of your own has its own"),
    ):
        EmbeddingClient(channel=channel, credentials=Credentials(token=TOKEN))


def test_secrets_are_not_printed(everything: Credentials, guarded: ServerProcess) -> None:
    assert TOKEN not in repr(everything) + str(everything) + f"{everything}"
    assert "client_key" not in repr(everything)
    assert "server_name='embed.example.org'" in repr(everything)
    assert repr(Credentials()) == "Credentials()"
    with EmbeddingClient(guarded.address, credentials=Credentials(token=TOKEN)) as client:
        assert TOKEN not in repr(client)


def test_the_system_has_authorities(files: Files, monkeypatch: pytest.MonkeyPatch, fortress: ServerProcess) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(files.ca))
    credentials = Credentials(
        token=TOKEN, cert=files.client_cert, key=files.client_key, server_name="embed.example.org"
    )
    assert credentials.tls
    with EmbeddingClient(fortress.address, credentials=credentials) as client:
        assert client.model().dimensions == 128


def test_the_command_takes_flags_and_environment(fortress: ServerProcess, files: Files) -> None:
    flags = ["--token-file", files.tokens, "--ca", files.ca, "--cert", files.client_cert, "--key", files.client_key]
    variables = {
        "MATVAE_TOKEN": TOKEN,
        "MATVAE_CA": str(files.ca),
        "MATVAE_CERT": str(files.client_cert),
        "MATVAE_KEY": str(files.client_key),
    }
    name = {"MATVAE_SERVER": fortress.address, "MATVAE_SERVER_NAME": "embed.example.org"}
    for command in (
        (["info", *flags], name),
        (["gallery", "list"], name | variables),
        (["plan", "--bytes-per-vector", "8", "--token-file", files.tokens], name | variables | {"MATVAE_TOKEN": "no"}),
    ):
        arguments, environment = command
        done = subprocess.run(
            [sys.executable, "-m", "matvae_client", *map(str, arguments), "--json"],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(done.stdout)


def test_the_command_says_what_is_missing(
    guarded: ServerProcess, files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", "--server", guarded.address]) == 1
    assert "--token-file or MATVAE_TOKEN" in capsys.readouterr().err
    (tmp_path / "empty").write_text("# none\n")
    assert main(["info", "--server", guarded.address, "--token-file", str(tmp_path / "empty")]) == 1
    assert "empty holds no token" in capsys.readouterr().err
    assert main(["info", "--server", "example.org:1", "--token-file", str(files.tokens)]) == 1
    said = capsys.readouterr().err
    assert "in plaintext" in said
    assert TOKEN not in said


def test_help_does_not_print_the_token(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MATVAE_TOKEN", TOKEN)
    with pytest.raises(SystemExit):
        main(["embed", "--help"])
    shown = capsys.readouterr().out
    assert "--token-file" in shown
    assert TOKEN not in shown
