"""Readers of a command's output: its progress (`NN%`) and the phases of it, and the last line of its stderr.

Both get the bytes as they pass and keep a bounded part of them. Binary data is ignored.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from jobstatus_grpc.cli.text import one_line, shortened
from jobstatus_grpc.job.validation import without_escapes

LONGEST_LINE = 4096
"""Bytes kept of a line. A progress bar is shorter."""

LONGEST_REASON = 200
"""Characters kept of a progress line as the job's reason: enough for one line on a terminal."""

_LINE_END = re.compile(rb"[\r\n]")

_PERCENT = re.compile(r"(?<![\w.,%-])(\d{1,3}(?:[.,]\d+)?) ?%(?!\w)")

_WIDE_SPACES = re.compile("[\u00a0\u2000-\u200a\u202f]")
"""Spaces that many languages put before a percent sign; str.isprintable refuses them."""

# What a percentage is of, if not of the work: a table of numbers (df, a coverage report), or a measurement.
_COLUMNS_BEFORE = re.compile(r"(?:(?:^|\s+)[\d.,]+(?:[KMGTPE]i?)?B?){2,}\s+$", re.IGNORECASE)

_MEASURE_BEFORE = re.compile(
    r"\b(?:cpu|mem|memory|disk|battery|coverage|usage|use|used|ratio|load)\b\W*$", re.IGNORECASE
)

_MEASURE_AFTER = re.compile(
    r"\W*\b(?:full|used|free|in use|usage|available|idle|cpu|memory|coverage|packet loss|faster|slower|smaller)\b",
    re.IGNORECASE,
)

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
    """Finds the newest progress in a stream, also in a bar that is redrawn after a carriage return."""

    def __init__(self, pattern: re.Pattern[str] | None = None) -> None:
        """Begin to read.

        Args:
            pattern: what is progress in a line: its group is the percentage, or its two groups are the part that is
                done and the whole. None: `NN%`.
        """
        self._pattern = pattern
        self._line = b""

    def feed(self, data: bytes) -> Progress | None:
        """Add bytes; return the newest progress that they complete, None if there is none."""
        *ended, self._line = _LINE_END.split(self._line + data)
        self._line = self._line[-LONGEST_LINE:]
        if b"\0" in data:
            return None
        if self._pattern is not None:
            # Not the line that is not ended: `(\d+)/(\d+)` would match the beginning of 1/100.
            return self._newest(ended)
        return self._newest([*ended, self._line]) if b"%" in data else None

    def _newest(self, lines: list[bytes]) -> Progress | None:
        for line in reversed(lines):
            text = _printable(line[-LONGEST_LINE:])
            found = _progress_in(text) if self._pattern is None else _progress_by(self._pattern, text)
            if found is not None:
                return found
        return None


def _printable(line: bytes) -> str:
    """Return the line without escape sequences; empty if it is binary data."""
    try:
        text = _WIDE_SPACES.sub(" ", without_escapes(line.decode()))
    except UnicodeDecodeError:
        return ""
    return text if text.replace("\t", "").replace("\b", "").isprintable() else ""


def _progress_in(text: str) -> Progress | None:
    for match in reversed(list(_PERCENT.finditer(text))):
        percent = float(match[1].replace(",", "."))
        before, after = text[: match.start()], text[match.end() :]
        if percent <= 100 and not _is_of_something_else(before, after):
            return Progress(percent, _without_bar(f"{before} {after}"))
    return None


def _is_of_something_else(before: str, after: str) -> bool:
    """Return whether a percentage between these texts does not measure the work."""
    is_in_url = "://" in before.rpartition(" ")[2]
    return bool(
        is_in_url or _COLUMNS_BEFORE.search(before) or _MEASURE_BEFORE.search(before) or _MEASURE_AFTER.match(after)
    )


def _progress_by(pattern: re.Pattern[str], text: str) -> Progress | None:
    """Return the last progress that the user's pattern finds; None too if its groups are no numbers."""
    for match in reversed(list(pattern.finditer(text))):
        try:
            part, *whole = (float(group.replace(",", ".")) for group in match.groups())
            percent = 100 * part / whole[0] if whole else part
        except (AttributeError, ValueError, ZeroDivisionError):  # AttributeError: a group that did not take part
            continue
        if 0 <= percent <= 100:
            return Progress(percent, _without_bar(f"{text[: match.start()]} {text[match.end() :]}"))
    return None


class Phases:
    """Counts the phases of a stream's progress: a fall to less than half begins a new one.

    Below DONE_PERCENT the fall must last for two values, because the bars of parallel downloads are printed in turns.
    """

    DONE_PERCENT = 99.0
    """From here on a phase counts as ended: some programs never print 100."""

    def __init__(self) -> None:
        self.number = 1
        self._last = 0.0
        self._fell = False

    def begins(self, percent: float) -> bool:
        """Take the next percentage; return whether it is the first of a new phase."""
        falls = percent < self._last / 2
        begins = falls and (self._fell or self._last >= self.DONE_PERCENT)
        self._fell = falls and not begins
        if not self._fell:
            self._last = percent
        self.number += begins
        return begins


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
