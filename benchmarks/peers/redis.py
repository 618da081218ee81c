"""Redis: a job is a hash, and each change is published on the job's channel, in one transaction."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.load.apis import PLACEHOLDER, JobsApi, Updates
from benchmarks.load.client import Client, Reply
from benchmarks.peers import Guarantees
from benchmarks.peers.connection import TcpConnection

if TYPE_CHECKING:
    from benchmarks.servers import Bench, Server

GUARANTEES = Guarantees(
    "with `appendfsync always`", "no, not while disconnected", "you write it: Lua", "you write it: Lua"
)
REASON = "copying /srv/data"
_CR_LF = b"\r\n"


def requirement() -> str:
    return "" if shutil.which("redis-server") else "redis-server is missing: apt-get install redis-server"


@contextmanager
def run(bench: Bench, folder: Path) -> Iterator[Server]:
    """Run Redis, with an append-only file that is written and fsynced before a reply is sent."""
    with bench.serve(RedisApi(), folder, lambda port: [
        "redis-server", "--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder), "--save", "",
        "--logfile", str(folder / "log"), "--appendonly", "yes", "--appendfsync", "always",
    ]) as server:  # fmt: skip
        yield server


class RedisConnection(TcpConnection):
    """A connection in RESP2. A transaction has a reply to each of its commands, of which the last counts."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self._pending: deque[tuple[Reply, int]] = deque()
        self._watcher: Reply | None = None

    def call(self, path: str, message: bytes, reply: Reply, *, is_last: bool = True) -> None:
        self.output.append(message)
        if path == RedisApi.watch:
            self._watcher = reply  # a connection that subscribes has no other calls
        else:
            self._pending.append((reply, len(_CHANGE) if path == RedisApi.update else 1))

    def receive(self) -> None:
        data, start = self.arrived(), 0
        while (end := _end_of(data, start)) > 0:
            self._pass_on(data[start:end])
            start = end
        self.rest = data[start:]

    def _pass_on(self, value: bytes) -> None:
        if self._watcher is not None:
            self._watcher.on_message(value)
            return
        reply, left = self._pending.popleft()
        if left > 1:
            self._pending.appendleft((reply, left - 1))
            return
        reply.on_message(value)
        reply.on_end(not value.startswith((b"-", b"*0", b"$-1")))  # an error, no such hash, no such field


def _end_of(data: bytes, start: int) -> int:
    """Return where the value that begins at `start` ends; 0: it has not arrived as a whole."""
    line_end = data.find(_CR_LF, start)
    if line_end < 0:
        return 0
    kind, end = data[start : start + 1], line_end + 2
    if kind not in (b"$", b"*") or data[start + 1 : start + 2] == b"-":
        return end
    count = int(data[start + 1 : line_end])
    if kind == b"$":
        return end + count + 2 if end + count + 2 <= len(data) else 0
    for _ in range(count):
        end = _end_of(data, end)
        if not end:
            return 0
    return end


_CHANGE = (
    ("MULTI",),
    ("HSET", "{key}", "state", "in_progress", "progress", "{progress}", "reason", "{reason}"),
    ("HINCRBY", "{key}", "revision", "1"),
    ("PUBLISH", "{key}", "in_progress {progress} {reason}"),
    ("EXEC",),
)


class RedisApi(JobsApi):
    """The commands to Redis, encoded."""

    read = "HGETALL"
    update = "MULTI"
    watch = "SUBSCRIBE"
    ends_watches = False
    watches_per_connection = 1
    connect = RedisConnection

    def create(self, client: Client, job_ids: Sequence[str]) -> None:
        fields = ("name", "nightly-backup", "state", "in_progress", "team", "storage", "revision", "1")
        client.call_all("HSET", [_command("HSET", job_id, *fields) for job_id in job_ids])

    def read_request(self, job_id: str) -> bytes:
        return _command("HGETALL", job_id)

    def updates(self, job_ids: Sequence[str]) -> Updates:
        return Updates(_change(job_ids[0], _progress(PLACEHOLDER).decode(), REASON), job_ids, _progress)

    def marked_request(self, job_id: str, mark: str, *, is_end: bool = False) -> bytes:
        return _change(job_id, "50", mark)

    def watch_request(self, job_id: str) -> bytes:
        return _command("SUBSCRIBE", job_id)

    def changes_of(self, client: Client, job_ids: Sequence[str]) -> int | None:
        replies = client.call_all("HGET", [_command("HGET", job_id, "revision") for job_id in job_ids])
        return sum(int(reply.split(_CR_LF)[1]) - 1 for reply in replies)


def _progress(value: float) -> bytes:
    return b"%013.9f" % value


def _change(job_id: str, progress: str, reason: str) -> bytes:
    values = {"key": job_id, "progress": progress, "reason": reason}
    return b"".join(_command(*(word.format(**values) for word in command)) for command in _CHANGE)


def _command(*words: str) -> bytes:
    encoded = [word.encode() for word in words]
    return b"*%d\r\n" % len(encoded) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in encoded)
