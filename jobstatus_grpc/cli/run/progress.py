"""Readers of a command's output: its progress (`NN%`), and the last line of its stderr.

Both get the bytes as they pass and keep a bounded part of them. Binary data is ignored.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from jobstatus_grpc.cli.text import one_line, shortened, without_escapes

LONGEST_LINE = 4096
"""Bytes kept of a line. A progress bar is shorter."""

LONGEST_REASON = 200
"""Characters kept of a progress line as the job's reason: enough for one line on a terminal."""

_LINE_END = re.compile(rb"[\r\n]")

_PERCENT = re.compile(r"(?<![\d.,-])(\d{1,3}(?:[.,]\d+)?) ?%")

# Characters that bars are drawn with, and the brackets that are left of an empty bar.
_BAR = re.compile(r"[-=#>*.·_~+|/\\█▉▊▋▌▍▎▏▐░▒▓■□▪━╸╺─⣿⠀⡀⣀⣄⣤⣦⣶⣷]{3,}|\[[\s#=>.-]*\]|\(\s*\)|\|\s*\|")

_EDGES = " \t:;,|-–—[]<>=#"


@dataclass(frozen=True, slots=True)
class Progress:
    """A percentage that a command printed."""

    percent: float
    """0 to 100."""
    text: str
    """The rest of the line, without a bar; may be empty."""


class PercentReader:
    """Finds the newest `NN%` in a stream, also in a bar that is redrawn after a carriage return."""

    def __init__(self) -> None:
        self._line = b""

    def feed(self, data: bytes) -> Progress | None:
        """Add bytes; return the newest progress that they complete, None if there is none."""
        pieces = _LINE_END.split(self._line + data)
        self._line = pieces[-1][-LONGEST_LINE:]
        if b"%" not in data or b"\0" in data:
            return None
        for piece in reversed(pieces):
            found = _progress_in(piece[-LONGEST_LINE:]) if b"%" in piece else None
            if found is not None:
                return found
        return None


def _progress_in(line: bytes) -> Progress | None:
    try:
        text = without_escapes(line.decode())
    except UnicodeDecodeError:
        return None
    if not text.replace("\t", "").replace("\b", "").isprintable():
        return None
    for match in reversed(list(_PERCENT.finditer(text))):
        percent = float(match[1].replace(",", "."))
        if percent <= 100:
            rest = f"{text[: match.start()]} {text[match.end() :]}"
            return Progress(percent, _without_bar(rest))
    return None


def _without_bar(text: str) -> str:
    """Return `text` without its bar; empty if no letter is left."""
    words = one_line(_BAR.sub(" ", text)).strip(_EDGES)
    return shortened(words, LONGEST_REASON) if any(character.isalpha() for character in words) else ""


class LastLine:
    """Keeps the last line of a stream that is not blank."""

    def __init__(self) -> None:
        self._line = b""
        self._last = ""

    def feed(self, data: bytes) -> None:
        """Add bytes."""
        *ended, rest = _LINE_END.split(self._line + data)
        for line in reversed(ended):
            words = _readable(line)
            if words:
                self._last = words
                break
        self._line = rest[:LONGEST_LINE]

    def read(self) -> str:
        """Return the line as text; empty if there was none."""
        return _readable(self._line) or self._last


def _readable(line: bytes) -> str:
    return one_line(line[:LONGEST_LINE].decode(errors="replace"))
