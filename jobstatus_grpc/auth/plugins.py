"""Authenticators of other distributions: entry points in the group `jobstatus_grpc.authenticators`.

An entry point names a function that takes the settings of its stanza, `[authenticators.NAME]` in the auth file, as a
dict, and returns an Authenticator. It is called in a thread without an event loop, whenever the settings change; a
ValueError refuses them.
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Sequence
from datetime import timedelta
from importlib.metadata import entry_points
from typing import Any

from jobstatus_grpc.auth.check_limit import CheckLimit
from jobstatus_grpc.auth.identity import Authenticator, Credentials, Identity, Role
from jobstatus_grpc.auth.stanzas import MAX_PRINCIPAL_BYTES, tenant_violations
from jobstatus_grpc.errors import (
    IdentityUnavailableError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnavailableError,
)
from jobstatus_grpc.toml_file import Value

log = logging.getLogger("jobstatus_grpc.server")

GROUP = "jobstatus_grpc.authenticators"

DEFAULT_CACHE = timedelta(seconds=3)
"""How long an identity without `expires_at` is kept: an authenticator is asked again soon after it changes its mind."""

ANSWER_SECONDS = 10.0
"""Time for an authenticator to answer."""


class PluggedAuthenticator:
    """An authenticator of another distribution, which may fail, and gets only the metadata that it asks for."""

    reads_certificate = True
    reads_peer = True

    def __init__(self, name: str, inner: Authenticator, *, metadata: Sequence[str], cache: timedelta) -> None:
        self.metadata_keys = frozenset(metadata)
        self._cache_seconds = cache.total_seconds()
        self._name = name
        self._inner = inner
        self._check_limit = CheckLimit()

    def seconds_kept(self, caller: Identity) -> float:
        """Return how long an identity may be kept at most."""
        return self._cache_seconds if caller.expires_at is None else float("inf")

    async def authenticate(self, credentials: Credentials) -> Identity | None:
        seen = Credentials(
            metadata=[(key, value) for key, value in credentials.metadata if key in self.metadata_keys],
            peer=credentials.peer,
            certificate=credentials.certificate,
        )
        try:
            with self._check_limit:
                found = await asyncio.wait_for(self._inner.authenticate(seen), ANSWER_SECONDS)
            if found is not None:
                _check(found)
            return found
        except (UnauthenticatedError, PermissionDeniedError, UnavailableError):
            raise
        except asyncio.TimeoutError:
            log.error("the authenticator %s has not answered in %g s; the call is refused", self._name, ANSWER_SECONDS)
        except Exception as error:
            # Not its message, which may repeat the credentials.
            where = "".join(traceback.format_tb(error.__traceback__))
            log.error(
                "the authenticator %s failed, the call is refused: %s\n%s", self._name, type(error).__name__, where
            )
        raise IdentityUnavailableError("the server cannot check the credentials now; its log says why. Try again later")


def _check(identity: object) -> None:
    """Raise an error if an authenticator returned what is no identity."""
    if not isinstance(identity, Identity) or not isinstance(identity.role, Role):
        raise TypeError("authenticate must return an Identity, or None")
    principal = identity.principal
    if not principal.isprintable() or not 0 < len(principal.encode()) <= MAX_PRINCIPAL_BYTES:
        raise ValueError("the principal is empty, too long, or has control characters")
    if tenant_violations(identity.tenant):
        raise ValueError("the tenant is not a name of a tenant")
    if identity.expires_at is not None and identity.expires_at.tzinfo is None:
        raise ValueError("expires_at must have a time zone")


class PluginReader:
    """Reads the tables `[authenticators.NAME]`. Keeps an authenticator while its settings stay the same."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[dict[str, Any], Authenticator]] = {}

    def __call__(self, section: Value) -> list[PluggedAuthenticator]:
        """Return the authenticators in the order of the file."""
        return [self._read(name, value) for name, value in section.entries().items()]

    def _read(self, name: str, value: Value) -> PluggedAuthenticator:
        settings = value.entries()
        metadata = (
            [each.lower() for each in settings["metadata"].texts()] if "metadata" in settings else ["authorization"]
        )
        cache = DEFAULT_CACHE
        if "cache" in settings:
            cache = settings["cache"].duration(shortest=timedelta(0), longest=timedelta(hours=1))
        own = {key: each.plain() for key, each in settings.items() if key not in ("metadata", "cache")}
        if self._kept.get(name, (None, None))[0] != own:
            self._kept[name] = own, self._open(name, value, own)
        return PluggedAuthenticator(name, self._kept[name][1], metadata=metadata, cache=cache)

    def _open(self, name: str, value: Value, settings: dict[str, Any]) -> Authenticator:
        found = entry_points(group=GROUP, name=name)
        if not found:
            names = ", ".join(sorted(entry_points(group=GROUP).names)) or "none"
            value.refuse(f"no installed package has an authenticator of this name; installed are: {names}")
        try:
            opened: Authenticator = next(iter(found)).load()(settings)
        except Exception as error:
            value.refuse(f"the authenticator cannot be used with these settings: {error}")
        if not callable(getattr(opened, "authenticate", None)):
            value.refuse("what the entry point returns has no method authenticate")
        return opened
