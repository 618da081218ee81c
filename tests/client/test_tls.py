"""TLS of the clients: addresses, CAs and certificates, files that change, tokens that are not sent in the clear."""

from __future__ import annotations

import logging
import pickle

import grpc
import pytest
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc import DeadlineExceededError, Tls, UnavailableError
from jobstatus_grpc.client.endpoint import CHECK_SECONDS, TlsFiles, endpoint
from tests.support.certificates import EXPIRED, Authority, Mount, Pair
from tests.support.scripted_server import ScriptedServer, a_job, reply

GOT = reply(pb.GetJobResponse(job=a_job()))
AUTHORITY = Authority()
SERVER, CLIENT = AUTHORITY.issue(), AUTHORITY.issue(name="client")


def served(pair=SERVER, *, mutual=False):
    """A server with TLS, which asks for client certificates if it is `mutual`."""
    secure = grpc.ssl_server_credentials([(pair.key, pair.cert)], AUTHORITY.pem if mutual else None, mutual)
    return ScriptedServer(secure, GetJob=[GOT])


def get(connect, address, *, timeout_seconds=10, **settings):
    """Get a job with a new client."""
    return connect(address, **settings).get("a", timeout_seconds=timeout_seconds)


@pytest.fixture
def ca(tmp_path):
    return AUTHORITY.write(tmp_path)


@pytest.fixture
def mount(tmp_path):
    return Mount(tmp_path, CLIENT, AUTHORITY.pem)


@pytest.mark.parametrize(
    ("address", "target", "uses_tls"),
    [
        ("grpcs://jobs.example", "jobs.example:50051", True),
        ("grpcs://jobs.example:443", "jobs.example:443", True),
        ("grpcs://[::1]", "[::1]:50051", True),
        ("grpcs://[::1]:1/", "[::1]:1", True),
        ("grpc://jobs.example", "jobs.example:50051", False),
        ("grpc://127.0.0.1:1", "127.0.0.1:1", False),
        ("jobs.example:1", "jobs.example:1", False),
    ],
)
def test_the_scheme_of_an_address_decides_on_tls(address, target, uses_tls):
    found = endpoint(address)
    assert (found.target, found.tls is not None) == (target, uses_tls)


@pytest.mark.parametrize(
    ("address", "tls"), [("grpcs://a:1", False), ("grpc://a:1", True), ("grpc://a:1", Tls(server_name="a"))]
)
def test_an_address_and_an_argument_that_contradict_each_other_are_refused(address, tls):
    with pytest.raises(ValueError, match="the opposite"):
        endpoint(address, tls=tls)


def test_a_ca_means_tls_and_public_cas_are_the_default(connect, ca):
    with served() as server:
        assert get(connect, server.address, tls=Tls(ca_file=ca), token="secret").id == "a"
        assert get(connect, f"grpcs://{server.address}", tls=Tls(ca_file=ca)).id == "a"
        assert "certificate is not trusted" in failure(connect, server.address, tls=True)


def test_a_client_certificate_is_presented(connect, mount):
    ours = Tls(ca_file=mount.ca, cert_file=mount.cert, key_file=mount.key)
    with served(mutual=True) as server:
        assert get(connect, server.address, tls=ours).id == "a"


def test_a_server_name_is_expected_instead_of_the_host(connect, ca):
    with served(AUTHORITY.issue(name="jobs.example", addresses=())) as server:
        assert get(connect, server.address, tls=Tls(ca_file=ca, server_name="jobs.example")).id == "a"


def failure(connect, address, **settings):
    """Return the message of a call that TLS makes fail, which must be one line."""
    # The error of the last try, or if that one was late the error of the one before.
    with pytest.raises((UnavailableError, DeadlineExceededError)) as caught:
        get(connect, address, timeout_seconds=2, **settings)
    assert "\n" not in caught.value.message
    assert "127.0.0.1" in caught.value.message
    return caught.value.message


@pytest.mark.parametrize(
    ("pair", "says"),
    [
        (Authority("other").issue(), "the server's certificate is not trusted: unable to get local issuer certificate"),
        (Authority().issue(), "the server's certificate is not trusted: certificate signature failure"),
        (AUTHORITY.issue(ends=EXPIRED), "the server's certificate is not trusted: certificate has expired"),
        (AUTHORITY.issue(name="other", addresses=()), "the server's certificate is for another host name"),
    ],
    ids=["other CA", "same name", "expired", "other host"],
)
def test_what_is_wrong_with_the_servers_certificate_is_said(connect, ca, pair, says):
    with served(pair) as server:
        assert says in failure(connect, server.address, tls=Tls(ca_file=ca))


def test_the_error_of_a_connection_that_is_closed_says_what_may_be_missing(connect, ca):
    with served(mutual=True) as server:
        assert "it may require TLS" in failure(connect, server.address)
        assert "or a client certificate that it trusts" in failure(connect, server.address, tls=Tls(ca_file=ca))


def test_tls_to_a_server_without_it_is_said(connect, ca):
    with ScriptedServer(GetJob=[GOT]) as server:
        assert "the server does not use TLS" in failure(connect, server.address, tls=Tls(ca_file=ca))


@pytest.mark.parametrize(
    "address",
    [
        "jobs.example:1",
        "10.0.0.1:1",
        "dns:///a:1",
        "dns://10.0.0.1/localhost:1",
        "ipv4:127.0.0.1:1,10.0.0.1:1",
        "xds:a",
    ],
)
def test_a_token_is_not_sent_to_another_machine_in_the_clear(address):
    with pytest.raises(ValueError, match=r"without encryption; use TLS .*insecure=True"):
        endpoint(address, token="secret")
    assert endpoint(address, token="secret", insecure=True).metadata
    assert endpoint(address, token="secret", tls=True).metadata


@pytest.mark.parametrize(
    "address",
    ["localhost:1", "127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "unix:/run/s", "dns:///localhost:1", "ipv6:[::1]:1"],
)
def test_a_token_may_be_sent_in_the_clear_within_the_machine(address):
    assert endpoint(address, token="secret").metadata


def test_a_token_is_not_in_the_repr_of_an_endpoint():
    assert "secret" not in repr(endpoint("localhost:1", token="secret"))


@pytest.mark.parametrize("given", [{"cert_file": "c.pem"}, {"key_file": "k.pem"}])
def test_a_certificate_and_its_key_need_each_other(given):
    with pytest.raises(ValueError, match="together"):
        Tls(**given)


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(FileNotFoundError, match=r"no\.pem"):
        endpoint("a:1", tls=Tls(ca_file="no.pem"))


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("tls.key", SERVER.key, "the key in {mount.key} does not fit the first certificate in {mount.cert}"),
        ("tls.key", b"no key", "{mount.cert} and {mount.key} are not a certificate and its key in PEM"),
        ("ca.crt", b"\xff", "{mount.ca} is not a file of CA certificates in PEM"),
        ("ca.crt", b"", "{mount.ca} is not a file of CA certificates in PEM"),
    ],
    ids=["other key", "no key", "bytes", "empty"],
)
def test_a_file_with_something_else_in_it_is_named(mount, name, data, says):
    (mount.folder / "..data" / name).write_bytes(data)
    with pytest.raises(ValueError, match=says.format(mount=mount)):
        endpoint("a:1", tls=Tls(ca_file=mount.ca, cert_file=mount.cert, key_file=mount.key))


class Clock:
    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds

    def pass_check(self):
        self.seconds += CHECK_SECONDS


@pytest.fixture
def clock():
    return Clock()


def test_changed_files_are_read_again(mount, clock):
    files = TlsFiles(Tls(ca_file=mount.ca, cert_file=mount.cert, key_file=mount.key), clock)
    before = files.current()
    mount.swap(SERVER, AUTHORITY.pem)
    assert files.current() is before
    clock.pass_check()
    assert files.current().cert == SERVER.cert
    clock.pass_check()
    assert files.current() is files.current()


def test_a_pickled_copy_looks_at_the_files_at_once(mount):
    files = TlsFiles(Tls(ca_file=mount.ca, cert_file=mount.cert, key_file=mount.key))
    mount.swap(SERVER, AUTHORITY.pem)
    assert pickle.loads(pickle.dumps(files)).current().cert == SERVER.cert


def test_bad_new_files_are_logged_once_and_those_before_stay_in_use(mount, clock, caplog):
    files = TlsFiles(Tls(ca_file=mount.ca, cert_file=mount.cert, key_file=mount.key), clock)
    mount.swap(Pair(cert=CLIENT.cert, key=SERVER.key), AUTHORITY.pem)
    for _ in range(4):
        clock.pass_check()
        assert files.current().key == CLIENT.key
    (warning,) = caplog.records
    assert (warning.name, warning.levelno) == ("jobstatus_grpc.client", logging.WARNING)
    assert f"the key in {mount.key} does not fit" in warning.getMessage()


def test_a_client_uses_a_new_connection_once_its_files_have_changed(connect, mount, monkeypatch):
    monkeypatch.setattr("jobstatus_grpc.client.endpoint.CHECK_SECONDS", 0.0)
    with served(mutual=True) as server:
        client = connect(server.address, tls=Tls(ca_file=mount.ca, cert_file=mount.cert, key_file=mount.key))
        for pair in (CLIENT, AUTHORITY.issue(name="second"), AUTHORITY.issue(name="third")):
            mount.swap(pair, AUTHORITY.pem)
            client.get("a")
            client.get("a")
    peers = [call["peer"] for call in server.metadata]
    assert len(set(peers)) == 3
    assert peers[0::2] == peers[1::2]
