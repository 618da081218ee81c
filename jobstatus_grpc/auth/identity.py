"""Identities and roles: what authenticators return, and what the server allows by it."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from jobstatus_grpc.errors import BadIdentityError
from jobstatus_grpc.job import DEFAULT_TENANT, JobFilter


class Role(enum.IntEnum):
    """What a caller may do; each role may also do what those before it may."""

    WATCHER = 1
    """Get, list, watch, read the history."""
    WORKER = 2
    """Create and update."""
    OPERATOR = 3
    """Cancel and delete."""
    ADMIN = 4
    """The same in every tenant; the metadata `x-jobstatus-tenant` selects it."""


@dataclass(frozen=True, slots=True)
class Identity:
    """The caller of an RPC."""

    principal: str
    """Its name, or without authentication its address; the actor in the history and the log."""
    tenant: str = DEFAULT_TENANT
    role: Role = Role.OPERATOR
    only: JobFilter | None = None
    """Labels and a name prefix: the caller sees and writes only jobs that match. None: all jobs of the tenant."""
    expires_at: datetime | None = None
    """None: never. Calls after `leeway_seconds` more are UNAUTHENTICATED, and open watches end so."""
    authenticated: bool = True
    """Whether it was proved. False: the server runs without authentication."""
    leeway_seconds: float = field(default=0, compare=False, kw_only=True)
    """By which the clocks of an issuer and the server may differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """What a call carries to prove its caller's identity."""

    metadata: Sequence[tuple[str, str | bytes]] = field(repr=False)
    """Keys are lower-case; those that end in `-bin` have bytes."""
    peer: str
    """The client's address as gRPC writes it: `ipv4:127.0.0.1:50000`."""
    certificate: bytes | None = field(default=None, repr=False)
    """The client's certificate (PEM), verified against the server's client CA. None: there is none."""


class UnknownIdentityError(BadIdentityError):
    """The credentials of the call are not known here. Check that they are whole, and meant for this server."""


class Authenticator(Protocol):
    """Finds the identity behind credentials of one kind."""

    async def authenticate(self, credentials: Credentials) -> Identity | None:
        """Return the caller's identity; None if the credentials are not of this kind, so that the next one is asked.

        Raises:
            BadIdentityError: the credentials are of this kind, and not valid. The call ends UNAUTHENTICATED.
            UnknownIdentityError: the same, unless another authenticator knows them.
            IdentityExpiredError: they were valid once.
            PermissionDeniedError: they are valid, and give the caller no role here.
            IdentityUnavailableError: they cannot be checked now. The call ends UNAVAILABLE; clients retry it.
        """
        ...
