"""The clock of a store that is given no other."""

from __future__ import annotations

from datetime import datetime, timezone


def utc_now() -> datetime:
    """Return this machine's time."""
    return datetime.now(timezone.utc)
