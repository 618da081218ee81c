"""The cursors of lists, which all stores have in common."""

from __future__ import annotations

from typing import TypeAlias

from jobstatus_grpc.errors import InvalidTokenError

MAX_EXAMINED_ROWS = 10_000
"""The number of jobs that are examined for one page; if too few of them match, the page is short."""

Cursor: TypeAlias = tuple[int, int]
"""A job's place in lists: created_at in microseconds since 1970, and a number that rises with each creation."""


def write_cursor(cursor: Cursor) -> str:
    """Return the text that `read_cursor` reads."""
    return f"{cursor[0]}.{cursor[1]}"


def read_cursor(text: str) -> Cursor:
    """Return the cursor in `text`.

    Raises:
        InvalidTokenError: it is not a cursor.
    """
    created, _, number = text.partition(".")
    if not all(part.isascii() and part.isdigit() and len(part) < 19 for part in (created, number)):
        raise InvalidTokenError
    return int(created), int(number)
