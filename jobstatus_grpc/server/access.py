"""The identity of each call's caller, and whether its role allows the RPC."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from hashlib import blake2b
from typing import Any

from jobstatus_grpc.auth import Credentials, Identity, Role
from jobstatus_grpc.auth.chain import Chain
from jobstatus_grpc.auth.stanzas import tenant_violations
from jobstatus_grpc.auth.tokens import canonical
from jobstatus_grpc.errors import (
    BadIdentityError,
    FieldViolation,
    IdentityExpiredError,
    IdentityUnavailableError,
    InvalidFieldError,
    JobStatusError,
    NoIdentityError,
    PermissionDeniedError,
)
from jobstatus_grpc.server.auth_file import AuthFile
from jobstatus_grpc.server.open_watches import OpenWatches, Watch
from jobstatus_grpc.server.transports.interface import CallContext, Metadata

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
    "GetOperation": Role.WATCHER,
    "ListOperations": Role.WATCHER,
    "WaitOperation": Role.WATCHER,
    "CancelOperation": Role.OPERATOR,
    "DeleteOperation": Role.OPERATOR,
}
"""By the name of the RPC; one without a row is refused to all."""

REFUSALS = (NoIdentityError, BadIdentityError, IdentityExpiredError, PermissionDeniedError, IdentityUnavailableError)

MAX_KNOWN = 10_000
"""Callers whose identity is remembered; each takes about 500 bytes."""


class Access:
    """Decides which caller a call is from. Without an auth file, each is an operator of the default tenant.

    Its methods take a call's metadata beside its context, because grpcio decodes it each time that it is asked for.
    """

    def __init__(self, file: AuthFile | None = None, *, clock: Callable[[], float] = time.time) -> None:
        """Take the file of --auth, and the time in seconds since 1970."""
        self.file = file
        self._clock = clock
        self._known: OrderedDict[bytes, tuple[Identity, float]] = OrderedDict()
        """By a digest of the credentials: the caller, and the time until which that holds."""
        self.refusals = Counter(dict.fromkeys((each.reason for each in REFUSALS), 0))
        """The calls that were refused for their credentials or their caller's role, by the reason of the error."""
        self.watches: OpenWatches | None = None
        """None: without an auth file, no watch ends because of its caller."""
        if file is not None:
            self._chain = Chain(file.contents)
            self.watches = OpenWatches(self._identify, authorize, clock=clock)
            file.on_change(self._use_changed_file)

    def known(self, context: CallContext, metadata: Metadata) -> Identity | None:
        """Return the caller's identity; None: call `identify`. Most calls need no more than this, and do not wait."""
        if self.file is None:
            return Identity(context.peer(), authenticated=False)
        key = self._key_of(context, metadata)
        entry = self._known.get(key)
        if entry is None:
            return None
        caller, ends_at = entry
        if self._clock() >= ends_at:
            del self._known[key]
            return None
        self._known.move_to_end(key)
        return caller

    async def identify(self, context: CallContext, metadata: Metadata) -> Identity:
        """Return the caller's identity.

        Raises:
            UnauthenticatedError: it has none that is valid.
            PermissionDeniedError: its credentials are valid, and give it no role.
            UnavailableError: its credentials cannot be checked now.
        """
        try:
            key, credentials = self._key_of(context, metadata), self._credentials_of(context, metadata)
            caller, _ = await self._identify(key, credentials)
        except JobStatusError as error:
            self.refusals[error.reason] += 1
            raise
        return caller

    def authorize(self, method: str, caller: Identity, metadata: Metadata) -> Identity:
        """Return what the function `authorize` does, and count its refusals."""
        try:
            return authorize(method, caller, tenants_of(metadata))
        except PermissionDeniedError as error:
            self.refusals[error.reason] += 1
            raise

    def watch(
        self, method: str, caller: Identity, context: CallContext, metadata: Metadata
    ) -> AbstractContextManager[None]:
        """Return a context for the task of a stream, which ends it once its caller would be refused."""
        assert self.watches is not None
        key = self._key_of(context, metadata)
        _, ends_at = self._known.get(key, (None, 0.0))
        watch = Watch(method, caller, frozenset(tenants_of(metadata)))
        return self.watches.opened(watch, key, self._credentials_of(context, metadata), ends_at)

    async def _identify(self, key: bytes, credentials: Credentials) -> tuple[Identity, float]:
        """Return the caller, and the time until which that holds."""
        chain = self._chain
        caller, cache_seconds = await chain.identify(credentials)
        ends_at = self._clock() + cache_seconds
        if caller.expires_at is not None:
            ends_at = min(ends_at, caller.expires_at.timestamp() + caller.leeway_seconds)
        if chain is self._chain:  # else the file has changed since it was asked
            self._known[key] = caller, ends_at
            if len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)
        return caller, ends_at

    def _use_changed_file(self) -> None:
        assert self.file is not None
        assert self.watches is not None
        self._known.clear()
        self._chain = Chain(self.file.contents)
        self.watches.check_all()

    def _credentials_of(self, context: CallContext, metadata: Metadata) -> Credentials:
        chain = self._chain
        return Credentials(
            metadata=[each for each in metadata if each[0] in chain.metadata_keys],
            peer=context.peer(),
            certificate=_certificate_of(context) if chain.reads_certificate else None,
        )

    def _key_of(self, context: CallContext, metadata: Metadata) -> bytes:
        """Return a digest of all that the caller is known by, so that no secret is kept here.

        The spellings of one bearer token are one, or a caller could take all places of `_known`.
        """
        chain = self._chain
        keys = chain.metadata_keys
        found: list[Any] = [
            (key, canonical(str(value)) if key == "authorization" else value) for key, value in metadata if key in keys
        ]
        if len(found) == 1 and chain.reads_metadata_only:
            return blake2b(str(found[0][1]).encode("utf-8", "surrogateescape"), digest_size=32).digest()
        parts: list[object] = [*found]
        if chain.reads_certificate:
            parts.append(_certificate_of(context))
        if chain.reads_peer:
            parts.append(context.peer().rpartition(":")[0])
        return blake2b(repr(parts).encode("utf-8", "surrogateescape"), digest_size=32).digest()


def _certificate_of(context: CallContext) -> bytes | None:
    """Return the client's certificate (PEM), which TLS has verified."""
    found = context.auth_context().get("x509_pem_cert")
    return found[0] if found else None


def tenants_of(metadata: Metadata) -> set[str]:
    """Return the tenants that a call's metadata selects."""
    return {str(value) for key, value in metadata if key == TENANT_KEY}


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
            f"only the role admin may choose a tenant (--tenant, {TENANT_KEY}); your role is "
            f"{caller.role.name.lower()}, and your tenant is {caller.tenant}"
        )
    tenant, *others = tenants
    violations = [FieldViolation(TENANT_KEY, each.description) for each in tenant_violations(tenant)]
    if others:
        violations.append(FieldViolation(TENANT_KEY, "must be one tenant, not several"))
    if violations:
        raise InvalidFieldError(violations=violations)
    return replace(caller, tenant=tenant)
