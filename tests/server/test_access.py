"""Roles against RPCs."""

from __future__ import annotations

import pytest

from jobstatus_grpc.auth import Identity, Role
from jobstatus_grpc.errors import PermissionDeniedError
from jobstatus_grpc.server.access import LEAST_ROLES, authorize
from jobstatus_grpc.server.servicer import SERVICE


def test_every_rpc_has_a_role():
    assert set(LEAST_ROLES) == {method.name for method in SERVICE.methods}


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("method", LEAST_ROLES)
def test_a_role_may_do_what_lesser_roles_may(method, role):
    caller = Identity("me", role=role)
    if role >= LEAST_ROLES[method]:
        authorize(method, caller)
    else:
        with pytest.raises(PermissionDeniedError):
            authorize(method, caller)


def test_an_rpc_without_a_row_is_refused_to_all():
    with pytest.raises(PermissionDeniedError):
        authorize("RebootWorld", Identity("me", role=Role.ADMIN))
