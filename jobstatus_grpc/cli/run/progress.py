"""What a command's output says about it: how far it is (`NN%`), and the last line that it wrote.

Both are fed bytes as they pass, keep a bounded part of them, and look at text only: binary data says nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from jobstatus_grpc.cli.text import one_line, shortened, without_escapes

LONGEST_LINE = 4096
"""What is kept of a line, in bytes. A progress bar is shorter."""

LONGEST_REASON = 200

_LINE_END = re.compile(rb"[\r\n]")

_PERCENT = re.compile(r"(?<![\d.,-])(\d{1,3}(?:[.,]\d+)?) ?%")

# What bars are drawn with, and what is left of one without its inside.
_BAR = re.compile(r"[-=#>*.·_~+|/\\█▉▊▋▌▍▎▏▐░▒▓■□▪━╸╺─⣿⠀⡀⣀⣄⣤⣦⣶⣷]{3,}|\[[\s#=>.-]*\]|\(\s*\)|\|\s*\|")

_EDGES = " \t:;,|-–—[]<>=#"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a command says that it is."""

    percent: float
    """0 to 100."""
    text: str
    """What else stood on the line; may be empty."""


class PercentReader:
    """Finds the newest `NN%` in a stream; a bar that is drawn anew after a carriage return counts too."""

    def __init__(self) -> None:
        self._line = b""

    def feed(self, data: bytes) -> Progress | None:
        """Take the next bytes; return the newest progress that they complete, None where they tell nothing."""
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
            return Progress(percent, _words(rest))
    return None


def _words(text: str) -> str:
    """Return what is left for people once the bar is gone."""
    words = one_line(_BAR.sub(" ", text)).strip(_EDGES)
    return shortened(words, LONGEST_REASON) if any(character.isalpha() for character in words) else ""


class LastLine:
    """Keeps the last line of a stream that is not blank."""

    def __init__(self) -> None:
        self._line = b""
        self._last = ""

    def feed(self, data: bytes) -> None:
        """Take the next bytes."""
        *ended, rest = _LINE_END.split(self._line + data)
        for line in reversed(ended):
            words = _readable(line)
            if words:
                self._last = words
                break
        self._line = rest[:LONGEST_LINE]

    def read(self) -> str:
        """Return it as one line of text; empty where there was none."""
        return _readable(self._line) or self._last


def _readable(line: bytes) -> str:
    return one_line(line[:LONGEST_LINE].decode(errors="replace"))
