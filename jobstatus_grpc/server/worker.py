"""The process of one worker of `jobstatus serve --workers N`: a whole server, which ends with its supervisor."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal
import sys
import threading
import time
from pathlib import Path

from jobstatus_grpc.errors import CannotStartError
from jobstatus_grpc.server import app, logs
from jobstatus_grpc.server.addresses import unix_path
from jobstatus_grpc.server.supervisor import END_SECONDS, Assignment, start_report

EXIT_CANNOT_START = 2

SIGN_SECONDS = 0.5
"""Between two signs of life: below the time of any watchdog that makes sense."""


def main() -> None:
    """Serve as the assignment on stdin says, and exit with the server's code."""
    report = os.dup(1)
    os.dup2(2, 1)  # so that nothing printed mixes with the report
    try:
        assignment: Assignment = pickle.load(sys.stdin.buffer)
    except EOFError:
        sys.exit(EXIT_CANNOT_START)  # the supervisor is gone already
    is_alone = threading.Event()
    threading.Thread(target=_end_with_supervisor, args=(assignment, is_alone), name="supervisor", daemon=True).start()
    server_log = logs.configure(
        assignment.log_format,
        assignment.log_level,
        calls=assignment.log_calls,
        worker=assignment.index,
        has_spans=assignment.config.otel,
    )

    def send_report(error: CannotStartError | None) -> None:
        with contextlib.suppress(OSError):
            os.write(report, start_report(error))

    def serves() -> None:
        send_report(None)
        os.set_blocking(report, False)
        _send_signs_of_life(report)

    try:
        code = app.run(assignment.config, ready=lambda _: serves(), server_log=server_log, private=assignment.private)
    except CannotStartError as error:
        send_report(error)
        code = EXIT_CANNOT_START
    if is_alone.is_set():
        _tidy_up(assignment)
    sys.exit(code)


def _send_signs_of_life(report: int) -> None:
    """Write a line from the event loop now, and at intervals from then on: WorkerProcess.check() expects them."""
    with contextlib.suppress(OSError):
        os.write(report, b"\n")
    asyncio.get_running_loop().call_later(SIGN_SECONDS, _send_signs_of_life, report)


def _end_with_supervisor(assignment: Assignment, is_alone: threading.Event) -> None:
    """Drain when the supervisor is gone, and end the process if that takes too long."""
    os.read(0, 1)  # nothing more is sent: this returns when the supervisor's end of the pipe closes
    is_alone.set()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(assignment.config.drain_grace.total_seconds() + END_SECONDS)
    os._exit(app.EXIT_BROKEN)


def _tidy_up(assignment: Assignment) -> None:
    """Remove the sockets and the folder that the supervisor would have removed; the last worker removes the folder."""
    path = Path(unix_path(assignment.private))
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
        path.parent.rmdir()
