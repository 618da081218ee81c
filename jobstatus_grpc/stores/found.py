"""Keys, and what stores must know of what is found under them."""

from __future__ import annotations

from datetime import timedelta
from typing import TypeAlias

from jobstatus_grpc.job import Job

Key: TypeAlias = tuple[str, str]
"""A job's tenant and id."""

TOMBSTONE_RETENTION = timedelta(hours=24)
"""A tombstone of this age is not found any more."""


LARGE_RESULT_CHARACTERS = 4096


def is_large(job: Job) -> bool:
    """Tell whether memory should not be filled with jobs like this: its result may have 64 KiB, and takes more here."""
    return job.result is not None and len(repr(job.result)) > LARGE_RESULT_CHARACTERS
