"""The server's log on stderr, as text or JSON: records of `logging`, and one line for each call.

All lines go through LogWriter, a thread with a bounded queue. Lines for calls are formatted by RequestLog: through
`logging` a line would cost a quarter of its call.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import math
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from random import getrandbits
from typing import Protocol, TypeAlias

from jobstatus_grpc.stores.batch import limit_routine_lines

log = logging.getLogger("jobstatus_grpc.server")


TraceFields: TypeAlias = Callable[[], Mapping[str, str]]
"""Returns the ids of the active span, empty without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLog:
    """What a server logs besides the records of `logging`. By default nothing."""

    calls: RequestLog | None = None
    lines_dropped: Callable[[], int] = int
    """Returns the number of lines that the process could not write."""


def configure(
    log_format: str,
    level: str,
    *,
    calls: bool = False,
    worker: int | None = None,
    has_spans: bool = False,
) -> ServerLog:
    """Log everything at `level` (a name, such as "info") and above to stderr, as `text` or `json`.

    Args:
        log_format: `text` or `json`.
        level: the lowest level to log.
        calls: log a line for each call at info, else at debug.
        worker: this process's number, if it is one of several that write there.
        has_spans: lines in JSON have the ids of the active span, if OpenTelemetry is installed.
    """
    trace_fields: TraceFields | None = None
    if has_spans:
        with suppress(ModuleNotFoundError, ValueError):  # missing, or a variable is refused: the server does not start
            from jobstatus_grpc import telemetry

            trace_fields = telemetry.log_fields
    writer = LogWriter(2)
    allowance = Allowance()
    handler = _WriterHandler(writer, allowance)
    handler.addFilter(ValueFilter().admits)
    handler.setFormatter(JsonFormatter(worker, trace_fields) if log_format == "json" else TextFormatter(worker))
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    if level != "debug":
        limit_routine_lines(allowance.admits)
    calls_level = logging.INFO if calls else logging.DEBUG
    request_log = None
    if logging.getLogger().isEnabledFor(calls_level):
        name = logging.getLevelName(calls_level).lower()
        request_log = RequestLog(log_format=log_format, stream=writer, level=name, worker=worker)
    return ServerLog(calls=request_log, lines_dropped=lambda: writer.lines_dropped)


MAX_PENDING_BYTES = 4 * 1024 * 1024
"""Memory for lines that are not written yet: some 15,000 lines, a few seconds of a busy server's log of calls."""

CLOSE_SECONDS = 1.0
"""Time to write what is pending when the process ends; a reader that has stopped must not keep it from ending."""


class LogWriter:
    """Writes lines to a file descriptor in a thread of its own: a call never waits for the log, or fails by it.

    If the reader has stopped and MAX_PENDING_BYTES are pending, or a write fails (disk full, pipe closed), lines are
    dropped and counted; once a write succeeds again, their number is logged. Whole lines are written in pieces that a
    pipe takes undivided, so that several processes can share it; a line longer than PIPE_BUF may be mixed with others.
    """

    def __init__(self, descriptor: int) -> None:
        self.lines_dropped = 0
        self._descriptor = descriptor
        self._pending: deque[bytes] = deque()
        self._pending_bytes = 0
        self._change = threading.Condition()
        self._is_mid_line = False
        # A daemon: the write that a stopped reader blocks must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def write(self, text: str) -> None:
        """Write one or more whole lines, soon."""
        data = text.encode(errors="backslashreplace")
        with self._change:
            if self._pending_bytes + len(data) > MAX_PENDING_BYTES:
                self.lines_dropped += data.count(b"\n")
                return
            self._pending.append(data)
            self._pending_bytes += len(data)
            self._change.notify_all()

    def close(self, at_most_seconds: float = CLOSE_SECONDS) -> None:
        """Wait until all lines are written, or the time is over."""
        with self._change:
            self._change.wait_for(lambda: not self._pending_bytes, at_most_seconds)

    def _run(self) -> None:
        reported = 0
        while True:
            with self._change:
                self._change.wait_for(lambda: self._pending)
                data = b"".join(self._pending)
                self._pending.clear()
            is_written = False
            for piece in _pieces(data):
                if self._write_piece(piece):
                    is_written = True
                else:
                    with self._change:
                        self.lines_dropped += piece.count(b"\n")
            with self._change:
                self._pending_bytes -= len(data)
                self._change.notify_all()
            if is_written and self.lines_dropped > reported:
                dropped, reported = self.lines_dropped - reported, self.lines_dropped
                log.warning("%d lines of this log were dropped: stderr was not read, or could not be written", dropped)

    def _write_piece(self, piece: bytes) -> bool:
        # os.write, not sys.stderr: that keeps what it could not write, and fails again when the interpreter ends.
        rest = b"\n" + piece if self._is_mid_line else piece
        try:
            while rest:
                try:
                    rest = rest[os.write(self._descriptor, rest) :]
                except BlockingIOError:  # another program that has the same terminal or pipe made it non-blocking
                    select.select([], [self._descriptor], [])
        except (OSError, ValueError):
            self._is_mid_line |= len(rest) < len(piece)
            return False
        self._is_mid_line = False
        return True


def _pieces(lines: bytes) -> Iterator[bytes]:
    """Divide lines into pieces of whole lines, of PIPE_BUF at most unless a single line is longer."""
    start = 0
    while start < len(lines):
        end = start + select.PIPE_BUF
        if end < len(lines):
            end = lines.rfind(b"\n", start, end) + 1 or lines.find(b"\n", start) + 1 or len(lines)
        yield lines[start:end]
        start = end


MAX_ROUTINE_BYTES_PER_DAY = 80_000_000
"""Lines about jobs that went well: with 16 jobs a second they would take ten times this."""

ROUTINE_BURST_BYTES = 64 * 1024
"""Such lines that are written at once after a quiet time: about 300."""

SUMMARY_SECONDS = 60.0
"""Between two lines that say how many were left out."""


class Allowance:
    """Limits the lines about jobs that are created, claimed and succeed, so that a day's log stays under 100 MB.

    All that is not routine is logged: a retry, a stall, a cancel, a failure, a deletion.
    """

    def __init__(self, *, seconds: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._bytes = float(ROUTINE_BURST_BYTES)
        self._counted_at = seconds()
        self._left_out = 0
        self._summary_at = 0.0

    def admits(self) -> bool:
        """Return whether such a line is to be made. The last one may exceed the allowance, and delays the next."""
        now = self._seconds()
        rise = (now - self._counted_at) * MAX_ROUTINE_BYTES_PER_DAY / 86400
        self._bytes = min(ROUTINE_BURST_BYTES, self._bytes + rise)
        self._counted_at = now
        if self._bytes > 0:
            return True
        self._left_out += 1
        if now >= self._summary_at:
            self._summary_at = now + SUMMARY_SECONDS
            log.info(
                "the log leaves out lines about jobs that are created, claimed and succeed, %d so far, to stay under "
                "100 MB a day; `jobstatus history ID` shows them, and --log-level debug logs all",
                self._left_out,
            )
        return False

    def written(self, line: str) -> None:
        """Count a line that was admitted."""
        self._bytes -= len(line)


UNDECODED_LOGGER = "grpc._cython.cygrpc"
"""Logs each value of metadata that is not UTF-8, several times a call, with a traceback."""


class ValueFilter:
    """Drops grpcio's records that have a value of a client's metadata, which may be a token; logs one line instead."""

    def __init__(self, *, seconds: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._left_out = 0
        self._log_at = -math.inf

    def admits(self, record: logging.LogRecord) -> bool:
        """Return whether the record is to be written."""
        if record.name != UNDECODED_LOGGER or not str(record.msg).startswith("Invalid encoding"):
            return True
        self._left_out += 1
        now = self._seconds()
        if now >= self._log_at:
            self._log_at = now + SUMMARY_SECONDS
            log.warning(
                "a client sends metadata that is not UTF-8, and is read as Latin-1; correct the client. The value may "
                "be a secret and is not logged; %d lines of grpcio about such values are left out so far",
                self._left_out,
            )
        return False


class _WriterHandler(logging.Handler):
    """Passes the records of `logging` to a LogWriter, and counts the routine ones."""

    def __init__(self, writer: LogWriter, allowance: Allowance) -> None:
        super().__init__()
        self._writer = writer
        self._allowance = allowance

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record) + "\n"
            self._writer.write(line)
            if getattr(record, "is_routine", False):
                self._allowance.written(line)
        except Exception as error:  # such as arguments that do not fit the message: no reason to fail a call
            self._writer.write(f"a log line of {record.pathname}:{record.lineno} cannot be formatted: {error!r}\n")

    def close(self) -> None:
        """Write what is pending; `logging` calls this when the process ends."""
        self._writer.close()
        super().close()


def _instant(record: logging.LogRecord) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z"


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, a worker's number, logger, message, ids of a span, and any traceback."""

    def __init__(self, worker: int | None = None, trace_fields: TraceFields | None = None) -> None:
        super().__init__()
        self._trace_fields = trace_fields
        self._worker = {} if worker is None else {"worker": worker}

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line = {
            "time": _instant(record),
            "level": record.levelname.lower(),
            **self._worker,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if self._trace_fields is not None:
            line |= self._trace_fields()
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
        fields = getattr(record, "fields", {})
        text = " ".join([record.getMessage(), *(f"{name}={_word(value)}" for name, value in fields.items())])
        if not text.isprintable():
            text = text.encode("unicode_escape").decode("ascii")
        line = f"{_instant(record)} {record.levelname.lower():7} {self._worker}{text}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _word(value: object) -> str:
    """Return a field's value in a line of text: values from outside must not look like other fields."""
    text = str(value)
    return text if text and text.isprintable() and not set(' "=') & set(text) else json.dumps(text)


GATHER_SECONDS = 0.1
"""Delay of a line, to write it together with others. A crash loses the lines of this time.

Row `get`: with a write per line, a call takes 7 % more CPU over grpcio and 10 % over native.
"""

MAX_GATHERED_LINES = 1000
"""Lines that are written before the delay is over."""


class Stream(Protocol):
    """What RequestLog writes to: a LogWriter."""

    def write(self, text: str, /) -> object:
        """Write one or more whole lines, without waiting or raising."""
        ...


_Call: TypeAlias = tuple[float, str, str, float, str, str, Mapping[str, str]]


class RequestLog:
    """Writes a line for each call to a stream, gathered for a tenth of a second. For one event loop.

    A crash loses the lines of its last tenth of a second; errors go through `logging`, at once.
    """

    def __init__(self, *, log_format: str, stream: Stream, level: str = "info", worker: int | None = None) -> None:
        """Write `text` or `json` to `stream`, with the worker's number if there is one."""
        is_json = log_format == "json"
        self._line = _json_line if is_json else _text_line
        self._level = f'"level": "{level}", ' if is_json else f"{level:7} "
        if worker is not None:
            self._level += f'"worker": {worker}, ' if is_json else f"worker={worker} "
        self._stream = stream
        self._calls: list[_Call] = []

    def write(
        self,
        method: str,
        code: str,
        reason: str,
        seconds: float,
        caller: str,
        principal: str,
        x_request_id: str,
        job_id: str,
        request_id: str,
        trace: Mapping[str, str] | None = None,
    ) -> None:
        """Log a call that has just ended.

        Args:
            method: the RPC.
            code: the name of its gRPC code.
            reason: that of its error; empty if it succeeded.
            seconds: how long it took.
            caller: the peer.
            principal: the caller's name, if it is not the peer.
            x_request_id: `x-request-id` of the metadata; if empty, it is replaced by a random one.
            job_id: the job, if the call names one.
            request_id: that of the request, if there is one.
            trace: the ids of its span; None: it has none.
        """
        calls = self._calls
        optional = {"reason": reason, "principal": principal, "job": job_id, "request_id": request_id}
        fields = {name: value for name, value in optional.items() if value}
        if trace is not None:
            fields |= trace
        calls.append((time.time(), method, code, seconds, caller, x_request_id, fields))
        if len(calls) == 1:
            asyncio.get_running_loop().call_later(GATHER_SECONDS, self.flush)
        elif len(calls) >= MAX_GATHERED_LINES:
            self.flush()

    def flush(self) -> None:
        """Write the gathered lines. Formatting them in one go takes half the time of one by one."""
        if self._calls:
            calls, self._calls = self._calls, []
            line, level = self._line, self._level
            self._stream.write("".join([line(level, *call) for call in calls]))


@functools.lru_cache(maxsize=4)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


_quoted = functools.lru_cache(maxsize=4096)(json.dumps)


def _json_line(
    level: str,
    now: float,
    method: str,
    code: str,
    seconds: float,
    caller: str,
    x_request_id: str,
    fields: Mapping[str, str],
) -> str:
    x_request_id = json.dumps(x_request_id) if x_request_id else f'"{getrandbits(64):016x}"'
    more = "".join([f', "{name}": {json.dumps(value)}' for name, value in fields.items()])
    return (
        f'{{"time": "{_second(int(now))}.{int(now * 1000) % 1000:03d}Z", {level}'
        f'"logger": "jobstatus_grpc.requests", "message": "request", "method": "{method}", "code": "{code}", '
        f'"duration_ms": {seconds * 1000:.3f}, "caller": {_quoted(caller)}{more}, "x_request_id": {x_request_id}}}\n'
    )


def _text_line(
    level: str,
    now: float,
    method: str,
    code: str,
    seconds: float,
    caller: str,
    x_request_id: str,
    fields: Mapping[str, str],
) -> str:
    more = "".join([f" {name}={_word(value)}" for name, value in fields.items()])
    return (
        f"{_second(int(now))}.{int(now * 1000) % 1000:03d}Z {level}request method={method} code={code} "
        f"duration_ms={seconds * 1000:.3f} caller={caller}{more} "
        f"x_request_id={_word(x_request_id or f'{getrandbits(64):016x}')}\n"
    )
