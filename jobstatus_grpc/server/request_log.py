"""One line in the log for each call.

Made and written by hand: through `logging`, a line costs as much as a quarter of the call that it tells of.
"""

from __future__ import annotations

import asyncio
import functools
import json
import sys
import time
from typing import Protocol

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
        self._lines: list[str] = []

    def write(self, method: str, code: str, seconds: float, caller: str, request_id: str) -> None:
        """Note a call that has just ended."""
        lines = self._lines
        lines.append(self._line(time.time(), self._worker, method, code, seconds * 1000, caller, request_id))
        if len(lines) == 1:
            asyncio.get_running_loop().call_later(GATHER_SECONDS, self.flush)
        elif len(lines) >= MAX_GATHERED_LINES:
            self.flush()

    def flush(self) -> None:
        """Write what is gathered."""
        if self._lines:
            text = "".join(self._lines)
            self._lines.clear()
            self._stream.write(text)
            self._stream.flush()


@functools.lru_cache(maxsize=4)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


_quoted = functools.lru_cache(maxsize=4096)(json.dumps)


def _json_line(
    now: float, worker: str, method: str, code: str, milliseconds: float, caller: str, request_id: str
) -> str:
    return (
        f'{{"time": "{_second(int(now))}.{int(now * 1000) % 1000:03d}Z", "level": "info", {worker}'
        f'"logger": "jobstatus_grpc.requests", "message": "request", "method": "{method}", "code": "{code}", '
        f'"duration_ms": {milliseconds:.3f}, "caller": {_quoted(caller)}, "request_id": {json.dumps(request_id)}}}\n'
    )


def _text_line(
    now: float, worker: str, method: str, code: str, milliseconds: float, caller: str, request_id: str
) -> str:
    if not request_id.isprintable() or " " in request_id:  # it comes from the caller, and must not look like more
        request_id = json.dumps(request_id)
    return (
        f"{_second(int(now))}.{int(now * 1000) % 1000:03d}Z info    {worker}request method={method} code={code} "
        f"duration_ms={milliseconds:.3f} caller={caller} request_id={request_id}\n"
    )
