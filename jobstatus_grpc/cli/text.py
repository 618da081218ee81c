"""Text of jobs and programs, made safe to print on one line of a terminal."""

from __future__ import annotations

import re

from jobstatus_grpc.job.validation import without_escapes

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")

_SPACES = re.compile(r"\s{2,}")


def one_line(text: str) -> str:
    """Return `text` as one line, without control sequences and control characters."""
    return _SPACES.sub(" ", _UNPRINTABLE.sub(" ", without_escapes(text))).strip()


def shortened(text: str, longest: int) -> str:
    """Return at most `longest` characters of `text`; if it was cut, the last one is an ellipsis."""
    return text if len(text) <= longest else text[: longest - 1] + "…"
