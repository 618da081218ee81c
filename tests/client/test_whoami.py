"""The identity of a client at the server, and the tenant in which an admin's client works."""

from __future__ import annotations

import pytest
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc import Identity, JobFilter, Role
from jobstatus_grpc.wire import convert
from tests.support.samples import LIMITED
from tests.support.scripted_server import ScriptedServer, a_job, reply


def test_without_authentication_each_caller_is_an_operator_of_the_default_tenant(client):
    me = client.whoami()
    assert me == Identity(me.principal, tenant="default", role=Role.OPERATOR, authenticated=False)
    assert me.principal.startswith("ipv4:127.0.0.1:")


def test_an_identity_is_read_with_its_limits_and_its_expiry(connect):
    with ScriptedServer(GetCallerIdentity=[reply(pb.GetCallerIdentityResponse(identity=LIMITED))]) as server:
        me = connect(server.address, token="secret").whoami()
    assert (me.principal, me.tenant, me.role, me.authenticated) == ("ci", "web", Role.WORKER, True)
    assert me.only == JobFilter(labels={"team": "core"}, name_prefix="core-")
    assert convert.identity_to_wire(me) == LIMITED


@pytest.mark.parametrize("number", [0, 99])
def test_a_role_that_this_version_does_not_know_is_the_least(number):
    assert convert.identity_from_wire(pb.CallerIdentity(role=number)).role is Role.WATCHER


def test_a_client_sends_its_tenant_with_each_call(connect):
    with ScriptedServer(GetJob=[reply(pb.GetJobResponse(job=a_job()))]) as server:
        connect(server.address, token="secret", tenant="web").get("a")
        (call,) = server.metadata
    assert (call["authorization"], call["x-jobstatus-tenant"]) == ("Bearer secret", "web")


@pytest.mark.parametrize("tenant", ["", "two words", "é", "a\nb"])
def test_a_tenant_that_cannot_be_sent_is_refused(connect, tenant):
    with pytest.raises(ValueError, match="the tenant must be printable ASCII"):
        connect("host:1", tenant=tenant)
