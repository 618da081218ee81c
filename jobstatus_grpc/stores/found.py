"""Keys, and what stores must know of what is found under them."""

from __future__ import annotations

from datetime import timedelta
from typing import TypeAlias

from jobstatus_grpc.errors import InvalidTokenError
from jobstatus_grpc.job import Job

Key: TypeAlias = tuple[str, str]
"""A job's tenant and id."""

TOMBSTONE_RETENTION = timedelta(hours=24)
"""A tombstone of this age is not found any more."""

FEED_RETENTION = timedelta(hours=24)
"""A change of this age may be dropped, unless it is the newest of a job that exists."""

MAX_EXAMINED_ROWS = 10_000
"""So many jobs are looked at for one page; where too few of them match, it is short."""

Cursor: TypeAlias = tuple[int, int]
"""When a job was created, in microseconds since 1970, and its number among those that were."""

LARGE_RESULT_CHARACTERS = 4096


def is_large(job: Job) -> bool:
    """Tell whether memory should not be filled with jobs like this: its result may have 64 KiB, and takes more here."""
    return job.result is not None and len(repr(job.result)) > LARGE_RESULT_CHARACTERS


def write_cursor(cursor: Cursor) -> str:
    """Return the text that `read_cursor` reads."""
    return f"{cursor[0]}.{cursor[1]}"


def read_cursor(text: str) -> Cursor:
    """Return the place in a list that `text` names.

    Raises:
        InvalidTokenError: it names none.
    """
    created, _, number = text.partition(".")
    if not all(part.isascii() and part.isdigit() and len(part) < 19 for part in (created, number)):
        raise InvalidTokenError
    return int(created), int(number)
