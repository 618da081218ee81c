"""Auth files for tests, and the metadata of callers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TypeVar

import grpc

from jobstatus_grpc.auth import Role
from jobstatus_grpc.auth.tokens import make_token, stanza_of
from jobstatus_grpc.job import DEFAULT_TENANT
from tests.support.service import Refusal, Service

T = TypeVar("T")

TRANSPORTS = ("grpcio", "native")


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    """Return the metadata of a call with a token."""
    return (("authorization", f"Bearer {token}"),)


async def until_answered(make_call: Callable[[], Awaitable[T]], *, seconds: float) -> T:
    """Make a call again and again until it succeeds, for at most `seconds`."""

    async def repeat() -> T:
        while True:
            try:
                return await make_call()
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.05)

    return await asyncio.wait_for(repeat(), seconds)


class AuthText:
    """The file of --auth of a test, and the tokens in it by their caller's name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tokens: dict[str, str] = {}
        self._stanzas: dict[str, str] = {}

    def admit(
        self,
        name: str,
        role: Role = Role.OPERATOR,
        *,
        tenant: str = DEFAULT_TENANT,
        expires_at: datetime | None = None,
        more: str = "",
    ) -> str:
        """Add a caller, or give the one of this name what is new, and write the file; return the caller's token."""
        token = self.tokens.setdefault(name, make_token())
        self._stanzas[name] = stanza_of(token, name, role, tenant=tenant, expires_at=expires_at) + more
        self.write()
        return token

    def remove(self, name: str) -> None:
        """Remove a caller, and write the file."""
        del self._stanzas[name]
        self.write()

    def add(self, name: str, stanza: str) -> None:
        """Add any stanza, or replace the one that was added under this name, and write the file."""
        self._stanzas[name] = stanza
        self.write()

    def write(self) -> None:
        """Replace the file at once, as an editor and Kubernetes do."""
        new = self.path.with_suffix(".new")
        new.write_text("\n".join(self._stanzas.values()))
        new.replace(self.path)


class Callers:
    """The callers of one server, each with a connection of its own."""

    def __init__(self, service: Service, auth: AuthText) -> None:
        self._service = service
        self._auth = auth
        self._opened: dict[tuple[str, ...], Service] = {}

    def __getitem__(self, name: str) -> Service:
        """Return the service as this caller uses it."""
        return self.in_tenant(name)

    def in_tenant(self, name: str, *tenants: str) -> Service:
        """Return the service as this caller uses it, with a tenant in the metadata."""
        key = (name, *tenants)
        if key not in self._opened:
            metadata = (*bearer(self._auth.tokens[name]), *(("x-jobstatus-tenant", tenant) for tenant in tenants))
            self._opened[key] = Service(self._service.address, self._service.process, metadata)
        return self._opened[key]

    def close(self) -> None:
        """Close the connections."""
        for service in self._opened.values():
            service.close()


def as_unknown(refusal: Refusal, job_id: str) -> Refusal:
    """Return a refusal with `?` in place of the job's id, to compare those of two jobs."""
    metadata = {name: value.replace(job_id, "?") for name, value in refusal.metadata.items()}
    return replace(refusal, message=refusal.message.replace(job_id, "?"), metadata=metadata)
