"""Who may call: TLS, client certificates, tokens, and what stays open to probes. Real processes, real handshakes."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

from matvae.v1 import embedding_pb2 as pb
from matvae.v1 import embedding_pb2_grpc as pb_grpc
from matvae_bench.server_process import ServerProcess, ServerStartError
from matvae_server import cli, security
from matvae_server.config import Security, ServerConfig

TOKEN, OTHER = "first-s3cret", "second-s3cret"
LIVES = health_pb2.HealthCheckResponse.SERVING


@dataclasses.dataclass(frozen=True)
class Files:
    """Certificates of one authority, and one of a stranger's, as files."""

    ca: Path
    cert: Path
    key: Path
    client_cert: Path
    client_key: Path
    stranger_ca: Path
    stranger_cert: Path
    stranger_key: Path
    tokens: Path

    def tls(self) -> tuple[str, ...]:
        return ("--tls-cert", str(self.cert), "--tls-key", str(self.key))

    def credentials(self, ca: Path | None = None, cert: Path | None = None, key: Path | None = None):
        return grpc.ssl_channel_credentials(
            (ca or self.ca).read_bytes(), key and key.read_bytes(), cert and cert.read_bytes()
        )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("security")
    made = Files(**{field.name: folder / field.name for field in dataclasses.fields(Files)})
    ours, strange = trustme.CA(), trustme.CA()
    ours.cert_pem.write_to_path(made.ca)
    strange.cert_pem.write_to_path(made.stranger_ca)
    for leaf, cert, key in (
        (ours.issue_cert("localhost", "127.0.0.1"), made.cert, made.key),
        (ours.issue_cert("client@example.org"), made.client_cert, made.client_key),
        (strange.issue_cert("client@example.org"), made.stranger_cert, made.stranger_key),
    ):
        leaf.cert_chain_pems[0].write_to_path(cert)
        leaf.private_key_pem.write_to_path(key)
    made.tokens.write_text(f"# who may call\n\n{TOKEN}\n{OTHER}\n")
    return made


@pytest.fixture(scope="module")
def guarded(files: Files) -> Iterator[ServerProcess]:
    """A server with tokens, in plaintext."""
    with ServerProcess("--token-file", str(files.tokens)) as server:
        yield server


def bearing(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


def refusal(call: Callable[..., object], *arguments: object, **options: object) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments, timeout=30, **options)
    return caught.value


def health_of(channel: grpc.Channel) -> int:
    return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=30).status


def test_tls_and_mutual_tls(start_server, files: Files) -> None:
    with start_server(*files.tls(), "--tls-client-ca", str(files.ca)) as server:
        mine = files.credentials(cert=files.client_cert, key=files.client_key)
        with grpc.secure_channel(server.address, mine) as channel:
            assert pb_grpc.EmbeddingServiceStub(channel).GetModel(pb.GetModelRequest(), timeout=30).card.dimensions
        for refused in (
            files.credentials(),
            files.credentials(cert=files.stranger_cert, key=files.stranger_key),
            files.credentials(files.stranger_ca, files.client_cert, files.client_key),
        ):
            with grpc.secure_channel(server.address, refused) as channel:
                error = refusal(pb_grpc.EmbeddingServiceStub(channel).GetModel, pb.GetModelRequest())
                assert error.code() is grpc.StatusCode.UNAVAILABLE
        with grpc.insecure_channel(server.address) as channel:
            assert refusal(pb_grpc.EmbeddingServiceStub(channel).GetModel, pb.GetModelRequest()).code() is (
                grpc.StatusCode.UNAVAILABLE
            )


def test_probes_have_a_plaintext_port_beside_tls(files: Files) -> None:
    command = [sys.executable, "-m", "matvae_server", "--port", "0", "--health-port", "0", *files.tls()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            said = {}
            for line in process.stdout:
                what, on, address = line.strip().rpartition(" on ")
                said[what if on else ""] = address
                if what == "matvae-serve ready":
                    break
            with grpc.insecure_channel(said["matvae-serve health"]) as channel:
                assert health_of(channel) == LIVES
                error = refusal(pb_grpc.EmbeddingServiceStub(channel).GetModel, pb.GetModelRequest())
                assert error.code() is grpc.StatusCode.UNIMPLEMENTED  # nothing but health is there
                watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
                assert next(watch).status == LIVES
                process.terminate()
                assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert process.wait(30) == 0
        finally:
            process.kill()


def test_a_health_port_in_use_is_said_with_its_flag(server: ServerProcess) -> None:
    with pytest.raises(ServerStartError, match=r"cannot listen on .*--health-port"):
        ServerProcess("--health-port", server.address.rpartition(":")[2])


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        bearing("wrong"),
        bearing(TOKEN[:-1]),
        bearing(f"{TOKEN}x"),
        bearing(""),
        (("authorization", TOKEN),),
        (("authorization", f"Basic {TOKEN}"),),
        (*bearing(TOKEN), *bearing("wrong")),
    ],
)
def test_who_bears_no_token_is_refused(guarded: ServerProcess, metadata) -> None:
    with grpc.insecure_channel(guarded.address) as channel:
        stub = pb_grpc.EmbeddingServiceStub(channel)
        error = refusal(stub.GetModel, pb.GetModelRequest(), metadata=metadata)
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        assert "authorization: Bearer TOKEN" in error.details()
        assert "x-request-id" in dict(error.trailing_metadata())


def test_every_method_asks_for_a_token_and_each_token_will_do(guarded: ServerProcess) -> None:
    with grpc.insecure_channel(guarded.address) as channel:
        stub = pb_grpc.EmbeddingServiceStub(channel)
        refused = [
            refusal(stub.Embed, pb.EmbedRequest()),
            refusal(lambda request, **options: list(stub.PullGallery(request, **options)), pb.PullGalleryRequest()),
            refusal(
                lambda requests, **options: list(stub.EmbedStream(requests, **options)), iter([pb.EmbedStreamRequest()])
            ),
            refusal(channel.unary_unary("/matvae.v1.EmbeddingService/NoSuchMethod"), b""),
            refusal(channel.unary_unary("/grpc.health.v1.HealthButNot/Check"), b""),
        ]
        assert {error.code() for error in refused} == {grpc.StatusCode.UNAUTHENTICATED}
        for token in (TOKEN, OTHER):
            assert stub.GetModel(pb.GetModelRequest(), metadata=bearing(token), timeout=30).card.dimensions
        missing = refusal(
            lambda request, **options: list(stub.PullGallery(request, **options)),
            pb.PullGalleryRequest(gallery="none"),
            metadata=bearing(TOKEN),
        )
        assert missing.code() is grpc.StatusCode.NOT_FOUND
        scheme = (("authorization", f"bearer {TOKEN}"),)  # RFC 9110: its case does not matter
        assert stub.GetModel(pb.GetModelRequest(), metadata=scheme, timeout=30).card.dimensions


def test_a_stranger_is_refused_before_the_message_is_received(guarded: ServerProcess) -> None:
    """What is over the limit of a message, or no message at all, would have another status if it were."""
    with grpc.insecure_channel(guarded.address, [("grpc.max_send_message_length", -1)]) as channel:
        embed = channel.unary_unary("/matvae.v1.EmbeddingService/Embed")
        too_large, no_message = (
            (bytes(17 * 2**20), "message larger than max"),
            (b"\xff" * 9, "bytes are no EmbedRequest"),
        )
        for sent, status in (too_large, no_message):
            assert refusal(embed, sent).code() is grpc.StatusCode.UNAUTHENTICATED
            assert status in refusal(embed, sent, metadata=bearing(TOKEN)).details()


def test_health_and_reflection_stay_open(guarded: ServerProcess, reflect) -> None:
    with grpc.insecure_channel(guarded.address) as channel:
        assert health_of(channel) == LIVES
        for version in ("v1", "v1alpha"):
            answer = reflect(channel, version, list_services="").list_services_response
            assert "matvae.v1.EmbeddingService" in {service.name for service in answer.service}


def test_tokens_change_without_a_restart_and_stand_in_no_log(start_server, tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"{TOKEN}\n")
    with start_server("--token-file", str(path), "--access-log") as server:
        with grpc.insecure_channel(server.address) as channel:
            told: list[str] = []
            get_model = pb_grpc.EmbeddingServiceStub(channel).GetModel

            def code(token: str) -> grpc.StatusCode:
                try:
                    get_model(pb.GetModelRequest(), metadata=bearing(token), timeout=30)
                except grpc.RpcError as error:
                    told.append(str(error))
                    return error.code()
                return grpc.StatusCode.OK

            assert code(TOKEN) is grpc.StatusCode.OK
            assert code(OTHER) is grpc.StatusCode.UNAUTHENTICATED
            fresh = tmp_path / "fresh"
            fresh.write_text(f"{OTHER}\n")
            fresh.replace(path)
            deadline = time.monotonic() + 30
            while code(OTHER) is not grpc.StatusCode.OK and time.monotonic() < deadline:
                pass  # each round is a call; the file is looked at once a second
            assert code(OTHER) is grpc.StatusCode.OK
            assert code(TOKEN) is grpc.StatusCode.UNAUTHENTICATED
        status, said = server.stop()
    assert status == 0
    assert f"read 1 tokens from {path}" in said
    assert "s3cret" not in said + "".join(told)


def test_metadata_that_are_not_utf_8_are_told_once_and_without_them(files: Files) -> None:
    """Of such metadata gRPC would log what they are, twice for each call."""
    with ServerProcess("--token-file", str(files.tokens), "--log-format", "json") as server:
        host, _, port = server.address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=10) as peer:
            sent = {
                b":method": b"POST",
                b":scheme": b"http",
                b":path": b"/matvae.v1.EmbeddingService/Embed",
                b":authority": b"x",
                b"te": b"trailers",
                b"content-type": b"application/grpc",
                b"authorization": f"Bearer {TOKEN}".encode() + b"\xff",
            }
            block = b"".join(b"\0" + bytes([len(k)]) + k + bytes([len(v)]) + v for k, v in sent.items())
            peer.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
            for stream in (1, 3, 5):
                peer.sendall(bytes([0, 0, len(block), 1, 5, 0, 0, 0, stream]) + block)
            received, refused = peer.makefile("rb"), 0
            while refused < 3:
                start = received.read(9)
                received.read(int.from_bytes(start[:3], "big"))
                refused += start[3] == 1  # HEADERS: what ends a call is all that there is of it
        _, log = server.stop()
    assert log.count("not UTF-8") == 1
    assert "Traceback" not in log
    assert TOKEN not in log


def test_a_token_file_that_goes_bad_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    now, path = [0.0], tmp_path / "tokens"
    path.write_text(f"{TOKEN}\n")
    tokens = security.Tokens(path, clock=lambda: now[0])
    for damage in (lambda: path.write_text("# none\n"), lambda: path.write_bytes(b"half a \xff"), path.unlink):
        damage()
        now[0] += 2
        assert tokens.admits(TOKEN)
        assert len(caplog.records) == 1
        assert caplog.records[0].levelname == "ERROR"
        assert str(path) in caplog.text
        now[0] += 2
        assert tokens.admits(TOKEN)
        assert len(caplog.records) == 1  # said once, not at every call
        caplog.clear()
    path.write_text(f"{OTHER}\n")
    now[0] += 0.5
    assert tokens.admits(TOKEN)  # not looked at yet
    now[0] += 2
    assert not tokens.admits(TOKEN)
    assert tokens.admits(OTHER)
    assert "s3cret" not in caplog.text + repr(tokens) + str(vars(tokens))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"tls_key": "client_key"}, r"--tls-key .*client_key is not the key of --tls-cert .*cert"),
        ({"tls_cert": "bad"}, r"--tls-cert .*bad holds no certificate in PEM"),
        ({"tls_cert": "missing"}, r"cannot read --tls-cert .*missing: No such file"),
        ({"tls_key": "bad"}, r"--tls-key .*bad is no private key in PEM"),
        ({"tls_key": "missing"}, r"cannot read --tls-key .*missing: No such file"),
        ({"tls_key": "locked"}, r"--tls-key .*locked is no private key in PEM without a passphrase"),
        ({"tls_client_ca": "bad"}, r"--tls-client-ca .*bad holds no certificate in PEM"),
        ({"tls_client_ca": "empty"}, r"--tls-client-ca .*empty holds no certificate in PEM"),
        ({"token_file": "empty"}, r"--token-file .*empty holds no token"),
        ({"token_file": "missing"}, r"cannot read --token-file .*missing: No such file"),
        ({"token_file": "key"}, r"--token-file .*key: line 1 is no token"),
    ],
)
def test_files_that_cannot_be_used_are_refused(
    files: Files, tmp_path: Path, settings: dict[str, str], says: str
) -> None:
    from cryptography.hazmat.primitives import serialization

    (tmp_path / "bad").write_text("-----BEGIN CERTIFICATE-----\nQUJD\n-----END CERTIFICATE-----\n")
    (tmp_path / "empty").write_text("# nothing\n")
    key = serialization.load_pem_private_key(files.key.read_bytes(), None)
    locked = serialization.BestAvailableEncryption(b"passphrase")
    (tmp_path / "locked").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked)
    )
    named = {field: getattr(files, name, tmp_path / name) for field, name in settings.items()}
    wanted = Security(**({"tls_cert": files.cert, "tls_key": files.key} | named))
    use = security.interceptors if wanted.token_file else security.credentials
    with pytest.raises(security.SecurityError, match=says) as refused:
        use(wanted)
    assert "PRIVATE KEY" not in str(refused.value)


@pytest.mark.parametrize(
    ("days", "says"), [((-2, -1), "certificate has expired"), ((1, 2), "certificate is not yet valid"), ((-1, 1), None)]
)
def test_a_certificate_out_of_its_time_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, days: tuple[int, int], says: str | None
) -> None:
    start, end = (datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=day) for day in days)
    issued = trustme.CA().issue_cert("localhost", not_before=start, not_after=end)
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(key)
    assert security.credentials(Security(tls_cert=cert, tls_key=key)) is not None
    assert [record.getMessage() for record in caplog.records] == (
        [f"--tls-cert {cert}: clients will refuse it: {says}"] if says else []
    )


def test_the_process_says_what_is_wrong_with_its_files(files: Files, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    for arguments in (
        ("--tls-cert", str(files.cert), "--tls-key", str(files.client_key)),
        ("--token-file", str(empty)),
    ):
        with pytest.raises(ServerStartError) as failed:
            ServerProcess(*arguments)
        assert str(failed.value).startswith(f"matvae-serve: {arguments[-2]} {arguments[-1]} ")
        assert "Traceback" not in str(failed.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "example.org"])
def test_other_machines_need_tls_and_a_token_or_insecure(files: Files, host: str) -> None:
    tls = {"tls_cert": files.cert, "tls_key": files.key}
    for partial in ({}, tls, {"token_file": files.tokens}):
        with pytest.raises(ValueError, match=f"host {host} is open to other machines"):
            ServerConfig(host=host, security=Security(**partial))
    ServerConfig(host=host, security=Security(**tls, token_file=files.tokens))
    ServerConfig(host=host, security=Security(insecure=True))


def test_the_command_refuses_other_machines_without_insecure(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--host", "0.0.0.0"])
    assert stopped.value.code == 2
    assert "host 0.0.0.0 is open to other machines" in capsys.readouterr().err


def test_observers_are_told_of_refusals_by_methods_that_exist(files: Files) -> None:
    seen: list[tuple[str, grpc.StatusCode]] = []

    async def ask() -> None:
        (gate,) = security.interceptors(
            Security(token_file=files.tokens), [lambda call, code: seen.append((call.method, code))]
        )
        server = grpc.aio.server(interceptors=[gate])
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            for method in ("Embed", "MadeUp"):
                with pytest.raises(grpc.aio.AioRpcError):
                    await channel.unary_unary(f"/matvae.v1.EmbeddingService/{method}")(b"", timeout=30)
        await server.stop(None)

    asyncio.run(ask())
    assert seen == [("Embed", grpc.StatusCode.UNAUTHENTICATED), ("", grpc.StatusCode.UNAUTHENTICATED)]
