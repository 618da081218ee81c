"""Patterns of names: `*` stands for one or more characters of one segment."""

from __future__ import annotations

import re


def to_pattern(text: str, *, separators: str) -> re.Pattern[str]:
    """Return a pattern for `fullmatch`, in which `*` matches no character of `separators`, which divide segments."""
    parts = (re.escape(part) for part in re.split(r"\*+", text))
    return re.compile(f"[^{re.escape(separators)}]+".join(parts))
