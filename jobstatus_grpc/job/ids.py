"""Ids of jobs that are created without one: UUIDs by RFC 9562."""

from __future__ import annotations

import hashlib
import secrets
import uuid
from datetime import datetime

from jobstatus_grpc.job.filter import JobFilter


def new_job_id(now: datetime) -> str:
    """Return a UUIDv7: 48 bits of milliseconds, then random bits (RFC 9562, 5.7)."""
    milliseconds = int(now.timestamp() * 1000)
    return _uuid(milliseconds << 80 | secrets.randbits(80), version=7)


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
