"""What to say to etcd, encoded by hand: its requests are a few fields of protobuf each.

A job is a key, its JobStatus message the value. Field numbers, of etcd's rpc.proto and kv.proto (package etcdserverpb):

    RangeRequest        key = 1; serializable = 7 stays unset: the read is linearizable
    RangeResponse       header = 1
    PutRequest          key = 1, value = 2
    WatchRequest        create_request = 1
    WatchCreateRequest  key = 1
    WatchResponse       header = 1, events = 11, one per change: a reader that lags gets several in a message
    ResponseHeader      revision = 3: of the whole store, one more with each Put
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks import messages
from benchmarks.client import Client
from benchmarks.messages import PLACEHOLDER, Updates

VARINT, BYTES = 0, 2


def varint(value: int) -> bytes:
    """Encode a number that is not negative, seven bits a byte, the lowest first."""
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def field(number: int, content: bytes) -> bytes:
    """Encode a field of bytes, text or a message."""
    return varint(number << 3 | BYTES) + varint(len(content)) + content


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Decode number and content of each field, as far as etcd's replies need: numbers, and what has a length.

    Raises:
        ValueError: it is not such a message.
    """
    place = 0
    while place < len(message):
        tag, place = _read_varint(message, place)
        value, place = _read_varint(message, place)
        if tag & 7 == VARINT:
            yield tag >> 3, value
        elif tag & 7 == BYTES:
            yield tag >> 3, message[place : place + value]
            place += value
        else:
            raise ValueError(f"a field of type {tag & 7} is more than this decoder knows")


def _read_varint(message: bytes, place: int) -> tuple[int, int]:
    value, shift = 0, 0
    while place < len(message):
        byte = message[place]
        value |= (byte & 127) << shift
        shift, place = shift + 7, place + 1
        if byte < 128:
            return value, place
    raise ValueError("the message ends within a number")


def revision_of(reply: bytes) -> int:
    """Return the store's revision in the header of any reply."""
    header = dict(fields(reply))[1]
    assert isinstance(header, bytes)
    revision = dict(fields(header))[3]
    assert isinstance(revision, int)
    return revision


class EtcdApi:
    """Of etcd."""

    read = "/etcdserverpb.KV/Range"
    update = "/etcdserverpb.KV/Put"
    batch = ""
    watch = "/etcdserverpb.Watch/Watch"
    ends_watches = False

    def __init__(self) -> None:
        self._prepared_revision = 0

    def prepare(self, client: Client, job_ids: Sequence[str]) -> None:
        for job_id in job_ids:
            reply = client.call(self.update, _put(job_id, messages.job_at_work(job_id).SerializeToString()))
            self._prepared_revision = revision_of(reply)

    def read_request(self, job_id: str) -> bytes:
        return field(1, job_id.encode())

    def updates(self, job_ids: Sequence[str], *, batch: bool = False) -> Updates:
        if batch or len(job_ids) > 1:
            raise ValueError("etcd has no batches that fail one by one")
        job = messages.job_at_work(job_ids[0])
        job.reason, job.progress = "copying /srv/data", PLACEHOLDER
        return Updates(_put(job.id, job.SerializeToString()), job_ids)

    def marked_request(self, job_id: str, mark: str, *, is_end: bool = False) -> bytes:
        job = messages.job_at_work(job_id)
        job.reason = mark
        return _put(job_id, job.SerializeToString())

    def watch_request(self, job_id: str) -> bytes:
        return field(1, field(1, job_id.encode()))

    def changes_in(self, message: bytes) -> int:
        return sum(number == 11 for number, _ in fields(message))

    def changes_of(self, client: Client, job_ids: Sequence[str]) -> int | None:
        return revision_of(client.call(self.read, self.read_request(job_ids[0]))) - self._prepared_revision


def _put(job_id: str, value: bytes) -> bytes:
    return field(1, job_id.encode()) + field(2, value)
