"""Client certificates as identities, through a server with TLS."""

from __future__ import annotations

import contextlib
from datetime import timedelta

import grpc
import pytest
from jobstatus.v1 import job_status_pb2 as pb
from jobstatus.v1.job_status_pb2_grpc import JobStatusServiceStub

from tests.support.auth import AuthText, bearer
from tests.support.certificates import Authority
from tests.support.servers import TRANSPORT
from tests.support.service import read_refusal

pytestmark = pytest.mark.skipif(TRANSPORT == "native", reason="the native transport has no TLS")

AUTHORITY = Authority()
ROBOT = "spiffe://acme.example/ns/ci/sa/robot"
STANZA = '[[certificates]]\nuri = "spiffe://acme.example/ns/*/sa/robot"\nrole = "operator"\n'


@pytest.fixture
def auth(tmp_path):
    auth = AuthText(tmp_path / "auth.toml")
    auth.admit("ci")
    auth.add("robot", STANZA)
    auth.add("admin", '[[certificates]]\ncn = "admin"\nrole = "admin"\n')
    return auth


@pytest.fixture
def connect(auth, serve, tmp_path):
    """Return a function that opens a stub with a new certificate, on a server that asks for one."""
    cert, key = AUTHORITY.issue().write(tmp_path, "server")
    ca = AUTHORITY.write(tmp_path)
    flags = ["--tls-cert", cert, "--tls-key", key, "--tls-client-ca", ca, "--tls-require-client-cert"]
    address = serve("--auth", str(auth.path), *flags).address
    with contextlib.ExitStack() as channels:

        def connect(uri, **settings):
            pair = AUTHORITY.issue(name="client", uris=[uri], **settings)
            credentials = grpc.ssl_channel_credentials(AUTHORITY.pem, pair.key, pair.cert)
            alone = [("grpc.use_local_subchannel_pool", 1)]
            return JobStatusServiceStub(channels.enter_context(grpc.secure_channel(address, credentials, alone)))

        yield connect


def actor_of(stub, metadata=()):
    """Create a job, and return the actor in its history."""
    job = stub.CreateJob(pb.CreateJobRequest(), metadata=metadata, timeout=20).job
    history = stub.ListJobTransitions(pb.ListJobTransitionsRequest(id=job.id), metadata=metadata, timeout=20)
    return history.transitions[0].actor


def end_of(call):
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    return read_refusal(caught.value).kind


def test_the_name_in_the_certificate_is_the_actor_and_a_token_counts_instead(auth, connect):
    stub = connect(ROBOT)
    assert (actor_of(stub), actor_of(stub, bearer(auth.tokens["ci"]))) == (ROBOT, "ci")


def test_a_certificate_that_no_stanza_admits_is_refused(connect):
    stub = connect("spiffe://acme.example/ns/ci/sa/other")
    with pytest.raises(grpc.RpcError, match="are not admitted here, and the call has no token") as caught:
        stub.ListJobs(pb.ListJobsRequest(), timeout=20)
    assert read_refusal(caught.value).kind == ("UNAUTHENTICATED", "BAD_IDENTITY")


def test_a_watch_ends_when_its_stanza_is_removed(auth, connect):
    watch = connect(ROBOT).WatchJobs(pb.WatchJobsRequest(), timeout=20)
    next(watch)
    auth.remove("robot")
    assert end_of(watch) == ("UNAUTHENTICATED", "BAD_IDENTITY")


@pytest.mark.slow
def test_a_watch_ends_when_the_certificate_of_its_connection_expires(connect):
    watch = connect(ROBOT, ends=timedelta(seconds=4)).WatchJobs(pb.WatchJobsRequest(), timeout=20)
    next(watch)
    assert end_of(watch) == ("UNAUTHENTICATED", "IDENTITY_EXPIRED")
