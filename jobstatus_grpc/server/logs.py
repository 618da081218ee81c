"""The server's log on stderr: lines for people, or JSON for machines. Workers say in each which of them wrote it."""

from __future__ import annotations

import json
import logging
import select
import sys
import time
from typing import TextIO

from jobstatus_grpc.server.request_log import RequestLog


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
