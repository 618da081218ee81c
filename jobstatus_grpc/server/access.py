"""The identity of each call's caller, and whether its role allows the RPC."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from hashlib import sha256

from jobstatus_grpc.auth import Authenticator, Credentials, Identity, Role
from jobstatus_grpc.auth.stanzas import tenant_violations
from jobstatus_grpc.auth.tokens import bearer_of, read_tokens
from jobstatus_grpc.errors import (
    BadIdentityError,
    FieldViolation,
    IdentityExpiredError,
    InvalidFieldError,
    JobStatusError,
    NoIdentityError,
    PermissionDeniedError,
)
from jobstatus_grpc.server.auth_file import AuthFile
from jobstatus_grpc.server.transports.interface import CallContext, Metadata
from jobstatus_grpc.toml_file import Reader

TENANT_KEY = "x-jobstatus-tenant"
"""Of the metadata with which an admin selects a tenant."""

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
    "GetCallerIdentity": Role.WATCHER,
}
"""By the name of the RPC; one without a row is refused to all."""


AUTHENTICATORS: Mapping[str, Reader] = {"tokens": read_tokens}
"""The sections of the auth file that admit callers, in the order in which they are asked."""

REFUSALS = (NoIdentityError, BadIdentityError, IdentityExpiredError)

MAX_KNOWN = 10_000
"""Callers whose identity is remembered; each takes about 500 bytes."""


class Access:
    """Decides which caller a call is from. Without an auth file, each is an operator of the default tenant."""

    def __init__(self, file: AuthFile | None = None, *, clock: Callable[[], float] = time.time) -> None:
        """Take the file of --auth, and the time in seconds since 1970."""
        self.file = file
        self._clock = clock
        self._known: OrderedDict[bytes, tuple[Identity, float]] = OrderedDict()
        """By a digest of the credentials: the caller, and the time until which that holds."""
        self.refusals = Counter(dict.fromkeys((each.reason for each in REFUSALS), 0))
        """The calls that were refused for their credentials, by the reason of the error."""
        if file is not None:
            file.on_change(self._known.clear)

    def known(self, context: CallContext) -> Identity | None:
        """Return the caller's identity; None: call `identify`. Most calls need no more than this, and do not wait."""
        if self.file is None:
            return Identity(context.peer(), authenticated=False)
        key = _key_of(context)
        if key is None or (entry := self._known.get(key)) is None:
            return None
        caller, ends_at = entry
        if self._clock() >= ends_at:
            del self._known[key]
            return None
        self._known.move_to_end(key)
        return caller

    async def identify(self, context: CallContext) -> Identity:
        """Return the caller's identity.

        Raises:
            UnauthenticatedError: it has none that is valid.
            UnavailableError: its credentials cannot be checked now.
        """
        assert self.file is not None
        metadata = tuple(context.invocation_metadata() or ())
        credentials = Credentials(metadata=metadata, peer=context.peer())
        contents = self.file.contents
        try:
            caller = await identity_of(credentials, [contents[name] for name in AUTHENTICATORS if name in contents])
        except JobStatusError as error:
            self.refusals[error.reason] += 1
            raise
        key = _key_of(context)
        if key is not None and contents is self.file.contents:
            ends_at = float("inf") if caller.expires_at is None else caller.expires_at.timestamp()
            self._known[key] = caller, ends_at
            if len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)
        return caller


def _key_of(context: CallContext) -> bytes | None:
    """Return a digest of the credentials, so that no secret is kept in memory; None: `identify` refuses them."""
    found = None
    for key, value in context.invocation_metadata() or ():
        if key == "authorization":
            if found is not None:
                return None
            found = value
    return None if found is None else sha256(str(found).encode("utf-8", "surrogateescape")).digest()


async def identity_of(credentials: Credentials, authenticators: Iterable[Authenticator]) -> Identity:
    """Return the identity that the first authenticator finds for which the credentials are its own.

    Raises:
        UnauthenticatedError: there is none, or it is not valid.
        UnavailableError: the credentials cannot be checked now.
    """
    for each in authenticators:
        caller = await each.authenticate(credentials)
        if caller is not None:
            return caller
    if bearer_of(credentials) is None:
        raise NoIdentityError
    raise BadIdentityError


def tenants_of(metadata: Metadata | None) -> set[str]:
    """Return the tenants that a call's metadata selects."""
    return {str(value) for key, value in metadata or () if key == TENANT_KEY}


def authorize(method: str, caller: Identity, tenants: Collection[str]) -> Identity:
    """Return the caller in the tenant that its call selects; if it selects none, in the caller's own.

    Raises:
        PermissionDeniedError: its role does not allow the RPC `method`, or another tenant.
        InvalidFieldError: an admin has selected several, or what is no tenant's name.
    """
    least = LEAST_ROLES.get(method)
    if least is None:
        raise PermissionDeniedError(f"no role may call {method}")
    if caller.role < least:
        raise PermissionDeniedError(
            f"{method} needs the role {least.name.lower()} or a higher one; yours is {caller.role.name.lower()}"
        )
    if all(tenant == caller.tenant for tenant in tenants):
        return caller
    if caller.role is not Role.ADMIN:
        raise PermissionDeniedError(
            f"{TENANT_KEY} selects a tenant for the role admin; yours is {caller.role.name.lower()}, in your own tenant"
        )
    tenant, *others = tenants
    violations = [FieldViolation(TENANT_KEY, each.description) for each in tenant_violations(tenant)]
    if others:
        violations.append(FieldViolation(TENANT_KEY, "must be one tenant, not several"))
    if violations:
        raise InvalidFieldError(violations=violations)
    return replace(caller, tenant=tenant)
