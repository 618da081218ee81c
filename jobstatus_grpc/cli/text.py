"""Text of jobs and programs, made safe to print on one line of a terminal."""

from __future__ import annotations

import re

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")

_SPACES = re.compile(r"\s{2,}")

# Terminal control sequences: CSI, OSC, then the short ones.
_ESCAPES = re.compile("\x1b(?:\\[[0-?]*[ -/]*[@-~]|\\][^\x07\x1b]*(?:\x07|\x1b\\\\)?|[ -/]*[0-~])")


def without_escapes(text: str) -> str:
    """Return `text` without terminal control sequences."""
    return _ESCAPES.sub("", text)


def one_line(text: str) -> str:
    """Return `text` as one line, without control sequences and control characters."""
    return _SPACES.sub(" ", _UNPRINTABLE.sub(" ", without_escapes(text))).strip()


def shortened(text: str, longest: int) -> str:
    """Return at most `longest` characters of `text`; if it was cut, the last one is an ellipsis."""
    return text if len(text) <= longest else text[: longest - 1] + "…"
