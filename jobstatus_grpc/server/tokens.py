"""Page and resume tokens: opaque texts, each valid for one kind of request with one filter or job of one tenant.

They are not secret: the store checks the payload again, within the caller's own tenant.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Collection
from dataclasses import fields
from datetime import datetime, timezone
from typing import Literal, TypeAlias

from jobstatus_grpc.errors import InvalidTokenError
from jobstatus_grpc.job import JobFilter

TokenKind: TypeAlias = Literal["page", "resume", "history"]

Scope: TypeAlias = bytes
"""The digest of a tenant and a filter, or of a tenant and a job's id, for which a token is valid."""

MAX_TOKEN_CHARACTERS = 4096
"""Longer tokens are refused unread; those made here have at most 512, see stores.interface.MAX_POSITION_CHARACTERS."""

_VERSION = b"\x01"

_DIGEST_BYTES = 8

_ALL_JOBS = JobFilter()


def filter_scope(tenant: str, job_filter: JobFilter) -> Scope:
    """Return the scope of tokens for a filter; the order of its values does not matter.

    It contains only the fields that are set: tokens stay valid when a field is added to JobFilter.
    """
    given = {field.name: getattr(job_filter, field.name) for field in fields(job_filter)}
    given = {name: value for name, value in given.items() if value != getattr(_ALL_JOBS, name)}
    return _scope(tenant, _to_json(given))


def job_scope(tenant: str, job_id: str) -> Scope:
    """Return the scope of tokens for one job."""
    return _scope(tenant, job_id)


def write_token(kind: TokenKind, scope: Scope, payload: str) -> str:
    """Return a token from which `read_token` gets `payload`, given the same kind and scope."""
    data = payload.encode()
    digest = hashlib.blake2b(scope + data, digest_size=_DIGEST_BYTES, person=kind.encode()).digest()
    return base64.urlsafe_b64encode(_VERSION + digest + data).rstrip(b"=").decode()


def read_token(kind: TokenKind, scope: Scope, text: str) -> str:
    """Return the payload of a token.

    Raises:
        InvalidTokenError: the token was not made for this kind and scope.
    """
    if len(text) <= MAX_TOKEN_CHARACTERS:
        try:
            data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
            payload = data[len(_VERSION) + _DIGEST_BYTES :].decode()
        except ValueError:  # not base64, or not UTF-8
            raise InvalidTokenError from None
        if write_token(kind, scope, payload) == text:
            return payload
    raise InvalidTokenError


def _scope(*parts: object) -> Scope:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


def _canonical(value: datetime | Collection[str | int]) -> str | list[str | int]:
    """Return a value of a filter that is not JSON as one that is, the same for equal values."""
    return value.astimezone(timezone.utc).isoformat() if isinstance(value, datetime) else sorted(value)


# json.dumps with arguments makes a new encoder on each call.
_to_json = json.JSONEncoder(default=_canonical, sort_keys=True).encode
