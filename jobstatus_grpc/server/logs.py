"""One line in the log for each call.

Made and written by hand: through `logging`, a line costs as much as a quarter of the call that it tells of.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import select
import sys
import time
from random import getrandbits
from typing import Protocol, TextIO


def configure(log_format: str, level: str, *, worker: int | None = None) -> RequestLog | None:
    """Send everything at `level` (a name, such as "info") and above to stderr, as `text` or `json`.

    Args:
        worker: this process's number, if it is one of several that write there.

    Returns:
        Where to note calls, if the level asks for that.
    """
    stream = sys.stderr if worker is None else SharedStream(sys.stderr)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter(worker) if log_format == "json" else TextFormatter(worker))
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    if not logging.getLogger().isEnabledFor(logging.INFO):
        return None
    return RequestLog(log_format=log_format, stream=stream, worker=worker)


class SharedStream:
    """A stream that other processes write to as well: passes on whole lines, in pieces that a pipe takes undivided.

    A line that is longer than such a piece may be torn apart.
    """

    def __init__(self, stream: TextIO) -> None:
        """Take a buffered stream: what it writes at once is one system call."""
        self._stream = stream

    def write(self, text: str) -> None:
        """Write lines."""
        piece: list[str] = []
        size = 0
        for line in text.splitlines(keepends=True):
            line_size = len(line.encode(errors="replace"))
            if piece and size + line_size > select.PIPE_BUF:
                self._pass_on(piece)
                piece, size = [], 0
            piece.append(line)
            size += line_size
        self._pass_on(piece)

    def flush(self) -> None:
        """Do nothing: all is written."""

    def _pass_on(self, lines: list[str]) -> None:
        self._stream.write("".join(lines))
        self._stream.flush()


def _instant(record: logging.LogRecord) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z"


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, a worker's number, logger, message, and a traceback where there is one."""

    def __init__(self, worker: int | None = None) -> None:
        """Take this process's number, if it is a worker."""
        super().__init__()
        self._worker = {} if worker is None else {"worker": worker}

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line = {
            "time": _instant(record),
            "level": record.levelname.lower(),
            **self._worker,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class TextFormatter(logging.Formatter):
    """Time, level, a worker's number, message. Control characters are escaped, so that a message stays one line."""

    def __init__(self, worker: int | None = None) -> None:
        """Take this process's number, if it is a worker."""
        super().__init__()
        self._worker = "" if worker is None else f"worker={worker} "

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, and a traceback below it where there is one."""
        text = record.getMessage()
        if not text.isprintable():
            text = text.encode("unicode_escape").decode("ascii")
        line = f"{_instant(record)} {record.levelname.lower():7} {self._worker}{text}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


GATHER_SECONDS = 0.1

MAX_GATHERED_LINES = 1000


class Stream(Protocol):
    """Where lines go."""

    def write(self, text: str, /) -> object:
        """Take one or more whole lines."""
        ...

    def flush(self) -> object:
        """Pass on what was taken."""
        ...


class RequestLog:
    """Writes lines to a stream, gathered for a tenth of a second. For one event loop.

    A crash loses the lines of its last tenth of a second; what it was caused by goes through `logging`, at once.
    """

    def __init__(self, *, log_format: str, stream: Stream | None = None, worker: int | None = None) -> None:
        """Write `text` or `json` to `stream` (default: stderr), in the name of a worker if this is one."""
        is_json = log_format == "json"
        self._line = _json_line if is_json else _text_line
        self._worker = "" if worker is None else f'"worker": {worker}, ' if is_json else f"worker={worker} "
        self._stream = stream or sys.stderr
        self._calls: list[tuple[float, str, str, float, str, str]] = []

    def write(self, method: str, code: str, seconds: float, caller: str, request_id: str) -> None:
        """Note a call that has just ended; without a `request_id` the line gets one of its own."""
        calls = self._calls
        calls.append((time.time(), method, code, seconds, caller, request_id))
        if len(calls) == 1:
            asyncio.get_running_loop().call_later(GATHER_SECONDS, self.flush)
        elif len(calls) >= MAX_GATHERED_LINES:
            self.flush()

    def flush(self) -> None:
        """Write what is gathered. Lines that are made one behind the other take half the time."""
        if self._calls:
            calls, self._calls = self._calls, []
            line, worker = self._line, self._worker
            self._stream.write("".join([line(worker, *call) for call in calls]))
            self._stream.flush()


@functools.lru_cache(maxsize=4)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


_quoted = functools.lru_cache(maxsize=4096)(json.dumps)


def _json_line(worker: str, now: float, method: str, code: str, seconds: float, caller: str, request_id: str) -> str:
    request_id = json.dumps(request_id) if request_id else f'"{getrandbits(64):016x}"'
    return (
        f'{{"time": "{_second(int(now))}.{int(now * 1000) % 1000:03d}Z", "level": "info", {worker}'
        f'"logger": "jobstatus_grpc.requests", "message": "request", "method": "{method}", "code": "{code}", '
        f'"duration_ms": {seconds * 1000:.3f}, "caller": {_quoted(caller)}, "request_id": {request_id}}}\n'
    )


def _text_line(worker: str, now: float, method: str, code: str, seconds: float, caller: str, request_id: str) -> str:
    request_id = request_id or f"{getrandbits(64):016x}"
    if not request_id.isprintable() or " " in request_id:  # it comes from the caller, and must not look like more
        request_id = json.dumps(request_id)
    return (
        f"{_second(int(now))}.{int(now * 1000) % 1000:03d}Z info    {worker}request method={method} code={code} "
        f"duration_ms={seconds * 1000:.3f} caller={caller} request_id={request_id}\n"
    )
