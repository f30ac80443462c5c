"""Errors that only the user can end are told at once, with the way out and without secrets."""

import os
import ssl
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from fault_proxy import FaultProxy, Refusal, Request, always
from s3_server import ACCESS_KEY, SECRET_KEY, S3Server, environment, forget_clients

from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.storage import Storage
from moe_replay.errors import ConfigError, StorageUnavailable

OPERATIONS = {
    "read": lambda store: store.exists(),
    "read the run": lambda store: store.read_run(),
    "find": lambda store: store.commit_of("routes", 0),
    "list": lambda store: store.folder.sizes(),
    "list one level": lambda store: store.folder.files(deep=False),
    "list folders": lambda store: store.iterations(),
    "write": lambda store: store.probe_writable(),
    "create": lambda store: store.create_run({}),
}


def require_refusal(store: RunStore, proxy: FaultProxy, *told: str) -> None:
    """Each operation raises a ConfigError that tells this and no secret, soon and without a second try."""
    for name, operation in OPERATIONS.items():
        proxy.forget()
        started = time.monotonic()
        with pytest.raises(ConfigError) as raised:
            operation(store)
        assert time.monotonic() - started < 3, name
        # To create is to look and to put.
        assert len(proxy.exchanges) <= 1 + (name == "create"), f"{name}: a refusal was tried again"
        said = str(raised.value)
        assert all(text in said for text in told), name
        assert not any(secret in said for secret in (ACCESS_KEY, SECRET_KEY, "other-key", "other-secret", "Signature="))
        assert raised.value.__cause__ is None
        assert raised.value.__suppress_context__


@pytest.mark.parametrize(
    ("access_key", "secret_key", "code"),
    [("other-key", SECRET_KEY, "InvalidAccessKeyId"), (ACCESS_KEY, "other-secret", "SignatureDoesNotMatch")],
)
def test_wrong_credentials(access_key, secret_key, code, proxy: FaultProxy, root, monkeypatch) -> None:
    for name, value in environment(proxy.url, access_key, secret_key).items():
        monkeypatch.setenv(name, value)
    forget_clients()

    require_refusal(RunStore(root, "run-1"), proxy, f"S3 answered {code}", "AWS_ACCESS_KEY_ID")


def test_no_credentials(root, proxy, monkeypatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    forget_clients()

    require_refusal(RunStore(root, "run-1"), proxy, "no credentials were found: set AWS_ACCESS_KEY_ID")


def test_a_missing_bucket_is_no_empty_run(proxy: FaultProxy) -> None:
    store = RunStore("s3://no-such-bucket/runs", "run-1")

    require_refusal(store, proxy, "s3://no-such-bucket/runs", "the bucket does not exist: create it first")


@pytest.mark.parametrize(
    ("refusal", "way_out"),
    [
        (Refusal(403, "AccessDenied"), "grant them reading, writing, listing and deleting"),
        (Refusal(403, "RequestTimeTooSkewed"), "set the clock"),
        (Refusal(400, "ExpiredToken"), "renew them"),
        (Refusal(400, "AuthorizationHeaderMalformed"), "set AWS_REGION"),
    ],
    ids=lambda case: getattr(case, "code", ""),
)
def test_refusals_name_their_way_out(refusal: Refusal, way_out: str, proxy: FaultProxy, store) -> None:
    proxy.plan = always(refusal)

    require_refusal(store, proxy, f"S3 answered {refusal.code}", way_out)


def test_a_refusal_to_say_where_objects_lie_is_no_damage(proxy: FaultProxy, store) -> None:
    writer = store.begin("rollout", 0, {}, "digest")
    writer.write_bytes("part-0.parquet", b"rows")
    ref = writer.commit()
    proxy.plan = lambda request: Refusal(403, "AccessDenied") if "/_objects-" in request.path else None

    with pytest.raises(ConfigError, match="S3 answered AccessDenied"):
        store.open(ref)


def test_a_profile_that_does_not_exist(root, proxy, monkeypatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "absent")
    forget_clients()

    require_refusal(RunStore(root, "run-1"), proxy, "correct AWS_PROFILE")


@pytest.fixture
def self_signed(tmp_path) -> Iterator[str]:
    """An https endpoint whose certificate nobody vouches for."""
    key = ec.generate_private_key(ec.SECP256R1())
    name, day = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")]), timedelta(days=1)
    now = datetime.now(UTC)
    certificate = x509.CertificateBuilder(name, name, key.public_key(), 1, now - day, now + day)
    encoding = serialization.Encoding.PEM
    plain = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    pem = key.private_bytes(encoding, *plain) + certificate.sign(key, hashes.SHA256()).public_bytes(encoding)
    (tmp_path / "server.pem").write_bytes(pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem")
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"https://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_certificate_that_nobody_vouches_for(self_signed, root, proxy, monkeypatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", self_signed)
    forget_clients()

    require_refusal(RunStore(root, "run-1"), proxy, "SSLError at 127.0.0.1", "set AWS_CA_BUNDLE")


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_a_bundle_that_holds_no_certificate(content, root, proxy, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    if content is not None:
        (tmp_path / "bundle.pem").write_text(content)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "bundle.pem"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://127.0.0.1:9")
    forget_clients()

    require_refusal(RunStore(root, "run-1"), proxy, "set AWS_CA_BUNDLE")


def test_an_endpoint_that_is_no_https(s3_server: S3Server, root, proxy, monkeypatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.url.replace("http:", "https:"))
    forget_clients()

    require_refusal(RunStore(root, "run-1"), proxy, "AWS_ENDPOINT_URL has its host's name and is really https")


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://no-such-host.invalid:9000"])
def test_an_endpoint_that_nobody_listens_at_is_unavailable_and_named(endpoint, root, monkeypatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    forget_clients()

    with pytest.raises(StorageUnavailable) as raised:
        Storage.at(root).read("a")

    assert endpoint.removeprefix("http://") in str(raised.value)


def test_a_profile_tells_endpoint_credentials_and_region(
    s3_server: S3Server, root, proxy, tmp_path, monkeypatch
) -> None:
    for name in environment(proxy.url):
        monkeypatch.delenv(name)
    (tmp_path / "config").write_text(
        f"[profile cluster]\nendpoint_url = {proxy.url}\nregion = eu-test-7\n"
        f"aws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_PROFILE", "cluster")
    forget_clients()

    assert region_asked(proxy, root) == "eu-test-7"
    assert (s3_server.folder / root.removeprefix("s3://") / "a").read_bytes() == b"1"


@pytest.mark.parametrize("variable", ["AWS_REGION", "AWS_DEFAULT_REGION"])
def test_either_variable_tells_the_region(variable, root, proxy, monkeypatch) -> None:
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    monkeypatch.setenv(variable, "eu-test-8")
    forget_clients()

    assert region_asked(proxy, root) == "eu-test-8"


def region_asked(proxy: FaultProxy, root: str) -> str:
    scopes = []

    def note(request: Request) -> None:
        # AWS4-HMAC-SHA256 Credential=<key>/<date>/<region>/s3/aws4_request, ...
        scopes.append(request.headers["authorization"].split("/")[2])

    proxy.plan = note
    Storage.at(root).write("a", b"1")
    return scopes[0]
