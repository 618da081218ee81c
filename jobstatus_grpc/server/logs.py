"""The server's log on stderr, as text or JSON: records of `logging`, and one line for each call.

Lines for calls are formatted and written by RequestLog: through `logging` a line would cost a quarter of its call.
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
    """Log everything at `level` (a name, such as "info") and above to stderr, as `text` or `json`.

    Args:
        worker: this process's number, if it is one of several that write there.

    Returns:
        The log of calls; None if the level is above info.
    """
    stream = sys.stderr if worker is None else SharedStream(sys.stderr)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter(worker) if log_format == "json" else TextFormatter(worker))
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    if not logging.getLogger().isEnabledFor(logging.INFO):
        return None
    return RequestLog(log_format=log_format, stream=stream, worker=worker)


class SharedStream:
    """A stream that other processes write to as well: writes whole lines, in pieces that a pipe takes undivided.

    A line longer than PIPE_BUF may be mixed with lines of others.
    """

    def __init__(self, stream: TextIO) -> None:
        """Take a buffered stream: each flush is one system call."""
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
        """Do nothing: `write` flushes."""

    def _pass_on(self, lines: list[str]) -> None:
        self._stream.write("".join(lines))
        self._stream.flush()


def _instant(record: logging.LogRecord) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z"


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, a worker's number, logger, message, and any traceback."""

    def __init__(self, worker: int | None = None) -> None:
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
        super().__init__()
        self._worker = "" if worker is None else f"worker={worker} "

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, and any traceback below it."""
        text = record.getMessage()
        if not text.isprintable():
            text = text.encode("unicode_escape").decode("ascii")
        line = f"{_instant(record)} {record.levelname.lower():7} {self._worker}{text}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


GATHER_SECONDS = 0.1
"""Delay of a line, to write it together with others. A crash loses the lines of this time.

Row `get`: with a write per line, a call takes 7 % more CPU over grpcio and 10 % over native.
"""

MAX_GATHERED_LINES = 1000
"""Lines that are written before the delay is over."""


class Stream(Protocol):
    """What RequestLog writes to."""

    def write(self, text: str, /) -> object:
        """Write one or more whole lines."""
        ...

    def flush(self) -> object:
        """Flush the lines written."""
        ...


class RequestLog:
    """Writes a line for each call to a stream, gathered for a tenth of a second. For one event loop.

    A crash loses the lines of its last tenth of a second; errors go through `logging`, at once.
    """

    def __init__(self, *, log_format: str, stream: Stream | None = None, worker: int | None = None) -> None:
        """Write `text` or `json` to `stream` (default: stderr), with the worker's number if there is one."""
        is_json = log_format == "json"
        self._line = _json_line if is_json else _text_line
        self._worker = "" if worker is None else f'"worker": {worker}, ' if is_json else f"worker={worker} "
        self._stream = stream or sys.stderr
        self._calls: list[tuple[float, str, str, float, str, str]] = []

    def write(self, method: str, code: str, seconds: float, caller: str, request_id: str) -> None:
        """Log a call that has just ended; an empty `request_id` is replaced by a random one."""
        calls = self._calls
        calls.append((time.time(), method, code, seconds, caller, request_id))
        if len(calls) == 1:
            asyncio.get_running_loop().call_later(GATHER_SECONDS, self.flush)
        elif len(calls) >= MAX_GATHERED_LINES:
            self.flush()

    def flush(self) -> None:
        """Write the gathered lines. Formatting them in one go takes half the time of one by one."""
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
    if (
        not request_id.isprintable() or " " in request_id
    ):  # it comes from the client, and must not look like other fields
        request_id = json.dumps(request_id)
    return (
        f"{_second(int(now))}.{int(now * 1000) % 1000:03d}Z info    {worker}request method={method} code={code} "
        f"duration_ms={seconds * 1000:.3f} caller={caller} request_id={request_id}\n"
    )
