"""Text from elsewhere made fit for one line of a terminal."""

from __future__ import annotations

import re

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")

_SPACES = re.compile(r"\s{2,}")

# What terminals take as commands: CSI and OSC sequences, then the short ones.
_ESCAPES = re.compile("\x1b(?:\\[[0-?]*[ -/]*[@-~]|\\][^\x07\x1b]*(?:\x07|\x1b\\\\)?|[ -/]*[0-~])")


def without_escapes(text: str) -> str:
    """Return `text` without what colours it and moves the cursor."""
    return _ESCAPES.sub("", text)


def one_line(text: str) -> str:
    """Return `text` as one line that no terminal takes for a command."""
    return _SPACES.sub(" ", _UNPRINTABLE.sub(" ", without_escapes(text))).strip()


def shortened(text: str, longest: int) -> str:
    """Return at most `longest` characters of `text`, the last an ellipsis where it was cut."""
    return text if len(text) <= longest else text[: longest - 1] + "…"
