"""Roles against RPCs."""

from __future__ import annotations

import asyncio
import io
from typing import Any, cast

import pytest

from jobstatus_grpc.auth import Identity, Role
from jobstatus_grpc.auth.chain import readers
from jobstatus_grpc.errors import InvalidFieldError, PermissionDeniedError
from jobstatus_grpc.server.access import LEAST_ROLES, TENANT_KEY, Access, authorize, tenants_of
from jobstatus_grpc.server.auth_file import AuthFile
from jobstatus_grpc.server.held_bytes import HeldBytes
from jobstatus_grpc.server.logs import RequestLog
from jobstatus_grpc.server.middleware import CallLimits, CallMiddleware
from jobstatus_grpc.server.services import JOB_STATUS, SERVICES
from jobstatus_grpc.server.transports.interface import Rpc
from jobstatus_grpc.server.transports.native import NativeStream
from tests.support.auth import bearer
from tests.support.comments import comments_of_rpcs


def test_every_rpc_has_a_role():
    assert set(LEAST_ROLES) == {method.name for service in SERVICES for method in service.methods}


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("method", LEAST_ROLES)
def test_a_role_may_do_what_lesser_roles_may(method, role):
    caller, least = Identity("me", role=role), LEAST_ROLES[method].name.lower()
    if role >= LEAST_ROLES[method]:
        assert authorize(method, caller, ()) is caller
    else:
        with pytest.raises(
            PermissionDeniedError, match=f"{method} needs the role {least}.* yours is {role.name.lower()}"
        ):
            authorize(method, caller, ())


def test_an_rpc_without_a_row_is_refused_to_all():
    with pytest.raises(PermissionDeniedError):
        authorize("RebootWorld", Identity("me", role=Role.ADMIN), ())


@pytest.mark.parametrize("method", JOB_STATUS.methods_by_name)
def test_the_comment_of_an_rpc_names_its_role(method):
    assert f"Least role: {LEAST_ROLES[method].name.lower()}." in comments_of_rpcs()[method]


def test_an_admin_selects_a_tenant():
    admin = Identity("me", tenant="ours", role=Role.ADMIN)
    assert authorize("GetJob", admin, tenants_of([("user-agent", "x"), (TENANT_KEY, "theirs")])).tenant == "theirs"
    assert authorize("GetJob", admin, ()).tenant == "ours"


@pytest.mark.parametrize("role", [role for role in Role if role is not Role.ADMIN])
def test_any_other_role_may_name_only_its_own_tenant(role):
    caller = Identity("me", tenant="ours", role=role)
    assert authorize("GetJob", caller, ("ours",)) is caller
    for other in ("theirs", "", "\n"):
        with pytest.raises(PermissionDeniedError, match=r"only the role admin .*--tenant.* your tenant is ours"):
            authorize("GetJob", caller, (other,))


@pytest.mark.parametrize("tenant", ["", "two words", "x" * 129, "é"])
def test_what_is_no_name_of_a_tenant_is_refused(tenant):
    with pytest.raises(InvalidFieldError, match=TENANT_KEY):
        authorize("GetJob", Identity("me", role=Role.ADMIN), (tenant,))


def test_a_call_names_one_tenant():
    with pytest.raises(InvalidFieldError, match="must be one tenant, not several"):
        authorize("GetJob", Identity("me", role=Role.ADMIN), ("a", "b"))


class CountingCall(NativeStream):
    """A call that counts how often its metadata is asked for."""

    def __init__(self, metadata):
        super().__init__(cast("Any", None), 1, (metadata, "ipv4:127.0.0.1:1", None), max_seconds=60)
        self.asked = 0

    def invocation_metadata(self):
        self.asked += 1
        return super().invocation_metadata()


def test_a_token_is_remembered_once_however_its_header_is_spelled(auth):
    token = auth.admit("ci")
    access = Access(AuthFile(str(auth.path), readers()))
    first, *others = (f"{scheme}{token} " for scheme in ("Bearer ", "bearer ", "BEARER   "))
    call = CountingCall(())
    caller = asyncio.run(access.identify(call, [("authorization", first)]))
    assert [access.known(call, [("authorization", other)]) for other in others] == [caller, caller]


@pytest.mark.parametrize("is_stream", [False, True])
def test_the_metadata_of_a_call_which_grpcio_decodes_each_time_is_asked_for_once(auth, is_stream):
    async def answer(data, caller, context):
        return None

    call = CountingCall(bearer(auth.admit("ci")))
    access = Access(AuthFile(str(auth.path), readers()))
    calls = CallMiddleware(
        CallLimits(1, 1), HeldBytes(2**20), access, RequestLog(log_format="json", stream=io.StringIO())
    )
    method = calls.wrap(Rpc("/jobstatus.v1.JobStatusService/WatchJob", answer, is_stream))

    async def main():
        await method.behaviour(b"", call)

    asyncio.run(main())
    assert call.asked == 1
