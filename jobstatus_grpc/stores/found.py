"""What a store finds under a key, and what it tells a reader who finds no job there."""

from __future__ import annotations

from datetime import timedelta
from typing import TypeAlias

from jobstatus_grpc.errors import JobExpiredError, JobNotFoundError
from jobstatus_grpc.job import Found, Job

Key: TypeAlias = tuple[str, str]
"""A job's tenant and id."""

TOMBSTONE_RETENTION = timedelta(hours=24)
"""A tombstone of this age is not found any more."""


LARGE_RESULT_CHARACTERS = 4096


def is_large(job: Job) -> bool:
    """Tell whether memory should not be filled with jobs like this: its result may have 64 KiB, and takes more here."""
    return job.result is not None and len(repr(job.result)) > LARGE_RESULT_CHARACTERS


def require_job(found: Found, job_id: str) -> Job:
    """Return the job that was found.

    Raises:
        JobNotFoundError, JobExpiredError: see JobStore.get.
    """
    if isinstance(found, Job):
        return found
    if found is None:
        raise JobNotFoundError(f"no job has the id {job_id!r}", id=job_id)
    raise JobExpiredError(f"job {job_id!r} was deleted or has expired", id=job_id)
