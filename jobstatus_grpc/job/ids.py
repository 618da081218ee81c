"""UUIDs by RFC 9562: ids of jobs that are created without one, and request_ids of clients."""

from __future__ import annotations

import hashlib
import re
import secrets
import uuid
from datetime import datetime, timedelta, timezone

from jobstatus_grpc.job.filter import JobFilter

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)

_V7_SHAPE = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", re.IGNORECASE)


def new_uuid7(now: datetime) -> str:
    """Return a UUIDv7: 48 bits of milliseconds, then random bits (RFC 9562, 5.7)."""
    milliseconds = int(now.timestamp() * 1000)
    return _uuid(milliseconds << 80 | secrets.randbits(80), version=7)


def uuid7_bytes(text: str) -> bytes | None:
    """Return the bytes of a UUIDv7, which are in the order of time; None if the text is not one, with hyphens."""
    return bytes.fromhex(text.replace("-", "")) if _V7_SHAPE.fullmatch(text) else None


def time_in(text: str) -> datetime | None:
    """Return when a UUIDv7 was made; None if the text is not one, with hyphens."""
    return _EPOCH + timedelta(milliseconds=int(text[:8] + text[9:13], 16)) if _V7_SHAPE.fullmatch(text) else None


def derived_job_id(tenant: str, request_id: str, only: JobFilter | None = None) -> str:
    """Return a UUIDv8 (RFC 9562, 5.8) that depends on the request alone, so that a retried create finds its job.

    Callers that are limited to different jobs (`only`) may use the same request_id.
    """
    limited = "" if only is None else f"\0{sorted(only.labels.items())}\0{only.name_prefix}"
    digest = hashlib.sha256(f"{tenant}\0{request_id}{limited}".encode()).digest()
    return _uuid(int.from_bytes(digest[:16], "big"), version=8)


def _uuid(bits: int, *, version: int) -> str:
    bits = bits & ~(0xF << 76) | version << 76
    bits = bits & ~(0x3 << 62) | 0x2 << 62
    return str(uuid.UUID(int=bits))
