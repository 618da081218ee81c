"""The identity of each call's caller, and whether its role allows the RPC."""

from __future__ import annotations

from collections.abc import Mapping

from jobstatus_grpc.auth import Identity, Role
from jobstatus_grpc.errors import PermissionDeniedError
from jobstatus_grpc.server.transports.interface import CallContext

LEAST_ROLES: Mapping[str, Role] = {
    "GetJob": Role.WATCHER,
    "ListJobs": Role.WATCHER,
    "ListJobTransitions": Role.WATCHER,
    "WatchJob": Role.WATCHER,
    "WatchJobs": Role.WATCHER,
    "CreateJob": Role.WORKER,
    "UpdateJob": Role.WORKER,
    "BatchUpdateJobs": Role.WORKER,
    "CancelJob": Role.OPERATOR,
    "DeleteJob": Role.OPERATOR,
}
"""By the name of the RPC; one without a row is refused to all."""


class Access:
    """Decides which caller a call is from. Without authentication, each is an operator of the default tenant."""

    async def identify(self, context: CallContext) -> Identity:
        """Return the caller's identity.

        Raises:
            UnauthenticatedError: it has none that is valid.
        """
        return Identity(context.peer())


def authorize(method: str, caller: Identity) -> None:
    """Raise PermissionDeniedError if the caller's role does not allow the RPC `method`."""
    least = LEAST_ROLES.get(method)
    if least is None or caller.role < least:
        raise PermissionDeniedError
