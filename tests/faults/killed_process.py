"""`jobstatus` that kills itself: `python -m tests.faults.killed_process POINT serve …`, at a random arrival at POINT.

Without the environment variable KILL it is `jobstatus` as it is.
"""

from __future__ import annotations

import functools
import itertools
import os
import random
import re
import signal
import sqlite3
import sys
import threading
import time
import types
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from jobstatus_grpc import cli, sweeper
from jobstatus_grpc.stores.sqlite import backup, database, maintenance, writer

LATEST_SECONDS = 0.003
"""The longest delay of a kill that is meant to come while SQLite works."""


def patch(module: types.ModuleType, **values: Any) -> None:
    """Replace attributes of a module."""
    for name, value in values.items():
        setattr(module, name, value)


_arrivals = itertools.count(1)


def strike(at: int) -> None:
    """End the process at the arrival number `at`."""
    if next(_arrivals) == at:
        os.kill(os.getpid(), signal.SIGKILL)


def strike_soon(at: int) -> None:
    """End the process within LATEST_SECONDS of the arrival number `at`, by another thread."""
    if next(_arrivals) == at:
        threading.Thread(target=kill_soon).start()


def kill_soon() -> None:
    time.sleep(random.uniform(0, LATEST_SECONDS))
    os.kill(os.getpid(), signal.SIGKILL)


def at_statement(is_point: Callable[[str], bool], *, before: Any = None, after: Any = None) -> None:
    """Call a function before or after each statement at the point."""

    class Connection(sqlite3.Connection):
        def execute(self, statement: str, *values: Any) -> Any:
            is_there = is_point(statement)
            if is_there and before is not None:
                before()
            cursor = super().execute(statement, *values)
            if is_there and after is not None:
                after()
            return cursor

        def executescript(self, script: str) -> Any:
            statement = ""
            code = re.sub("--.*", "", script)  # a comment may have a semicolon
            for line in code.replace(";", ";\n").splitlines(keepends=True):
                statement += line
                if sqlite3.complete_statement(statement):
                    self.execute(statement)
                    statement = ""
            return self.execute(statement)

    patch(sqlite3, connect=functools.partial(sqlite3.connect, factory=Connection))


def before_a_commit() -> None:
    at = random.randrange(1, 100)
    at_statement(lambda statement: statement == "COMMIT", before=lambda: strike(at))


def in_a_commit() -> None:
    at = random.randrange(1, 100)
    at_statement(lambda statement: statement == "COMMIT", before=lambda: strike_soon(at))


def after_a_commit_and_before_its_reply() -> None:
    at = random.randrange(1, 100)
    at_statement(lambda statement: statement == "COMMIT", after=lambda: strike(at))


def in_a_checkpoint() -> None:
    patch(writer, CHECKPOINT_BYTES=100_000)
    at = random.randrange(1, 10)
    at_statement(lambda statement: "wal_checkpoint" in statement, before=lambda: strike_soon(at))


def in_a_trim() -> None:
    often, soon = timedelta(seconds=0.1), timedelta(seconds=0.5)
    patch(sweeper, TRIM_INTERVAL_SECONDS=0.02)
    patch(maintenance, MARK_INTERVAL=often, WALK_INTERVAL=often, FEED_RETENTION=soon, TOMBSTONE_RETENTION=soon)
    at = random.randrange(1, 10)
    at_statement(lambda statement: statement.lstrip().startswith("DELETE FROM changes"), after=lambda: strike(at))


def in_a_migration() -> None:
    at = int(os.environ["KILL"])
    at_statement(lambda statement: bool(statement.strip()), before=lambda: strike(at))


def in_a_backup() -> None:
    """While the pages are copied, before the copy is checked, before it gets its name, or after that."""
    point = random.randrange(4)
    find_damage, replace = database.find_damage, os.replace

    class Connection(sqlite3.Connection):
        def backup(self, *values: Any, **settings: Any) -> None:
            if point == 0:
                strike_soon(1)
            super().backup(*values, **settings)

    def find_damage_or_die(*values: Any) -> str:
        strike(int(point == 1))
        return find_damage(*values)

    def replace_or_die(*values: Any) -> None:
        strike(int(point == 2))
        replace(*values)
        os.kill(os.getpid(), signal.SIGKILL)

    patch(sqlite3, connect=functools.partial(sqlite3.connect, factory=Connection))
    patch(backup, find_damage=find_damage_or_die)
    patch(os, replace=replace_or_die)


POINTS: dict[str, Callable[[], None]] = {
    point.__name__.replace("_", " "): point
    for point in (
        before_a_commit,
        in_a_commit,
        after_a_commit_and_before_its_reply,
        in_a_checkpoint,
        in_a_trim,
        in_a_migration,
        in_a_backup,
    )
}

if __name__ == "__main__":
    point = POINTS[sys.argv.pop(1)]
    if "KILL" in os.environ:
        point()
    cli.main()
