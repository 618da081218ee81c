"""The requests that the load generator sends to a server: the same few operations in each side's API."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from jobstatus.v1 import job_status_pb2 as pb

from benchmarks.load.client import Client, Connection

_DOUBLE = struct.Struct("<d")
PLACEHOLDER = 77.125731904731
"""A progress; its encoded bytes occur nowhere else in a request."""
BATCH = 100
"""The number of updates in a batch."""


def batches(items: Sequence[Any]) -> list[Any]:
    """Split `items` into batches."""
    return [items[start : start + BATCH] for start in range(0, len(items), BATCH)]


def path(method: str) -> str:
    """Return the path of a method of our service."""
    return f"/{pb.DESCRIPTOR.services_by_name['JobStatusService'].full_name}/{method}"


class Updates:
    """Requests that report progress, each a little more than the one before: every request changes its jobs."""

    def __init__(
        self, template: bytes, job_ids: Sequence[str], encode: Callable[[float], bytes] = _DOUBLE.pack
    ) -> None:
        """Make requests for `job_ids` of a template with PLACEHOLDER as its progress.

        `encode` returns a progress as it is in the template, always with the same number of bytes.
        """
        self._template = bytearray(template)
        self._places = [match.span() for match in re.finditer(re.escape(encode(PLACEHOLDER)), template)]
        self._encode = encode
        self.job_ids = job_ids
        self.sent = 0
        """The number of requests made so far."""

    def __call__(self) -> bytes:
        """Return the next request."""
        progress = self._encode(10 + self.sent * 0.0001)
        self.sent += 1
        for start, end in self._places:
            self._template[start:end] = progress
        return bytes(self._template)


def job_at_work(job_id: str) -> pb.JobStatus:
    """Return a job in attempt 1."""
    job = pb.JobStatus(id=job_id, name="nightly-backup", state=pb.JOB_STATE_IN_PROGRESS, reports_progress=True)
    job.heartbeat_timeout.seconds = 600
    job.labels["team"] = "storage"
    return job


class JobsApi:
    """Our service's requests. The other APIs override what differs."""

    read = path("GetJob")
    update = path("UpdateJob")
    batch = path("BatchUpdateJobs")
    watch = path("WatchJob")
    ends_watches = True
    """Whether the server closes the watches of a job when the job ends."""
    connections = 8
    """At most, of many callers."""
    watches_per_connection = 50
    connect: Callable[[str], Connection] | None = None
    """Opens a connection; None: HTTP/2 with gRPC."""

    def create(self, client: Client, job_ids: Sequence[str]) -> None:
        """Create jobs."""
        requests = [pb.CreateJobRequest(job=job_at_work(job_id)) for job_id in job_ids]
        client.call_all(path("CreateJob"), [request.SerializeToString() for request in requests])

    def read_request(self, job_id: str) -> bytes:
        return pb.GetJobRequest(id=job_id).SerializeToString()

    def updates(self, job_ids: Sequence[str]) -> Updates:
        """Return requests of the method `update` for one job, of `batch` for several."""
        jobs = [pb.JobStatus(id=job_id, reason="copying /srv/data", progress=PLACEHOLDER) for job_id in job_ids]
        updates = [pb.UpdateJobRequest(job=job, attempt=1) for job in jobs]
        message = pb.BatchUpdateJobsRequest(updates=updates) if len(jobs) > 1 else updates[0]
        return Updates(message.SerializeToString(), job_ids)

    def marked_request(self, job_id: str, mark: str, *, is_end: bool = False) -> bytes:
        """Return an update after which watchers receive a message that contains `mark`; `is_end`: the job's last."""
        state = pb.JOB_STATE_SUCCEEDED if is_end else pb.JOB_STATE_UNSPECIFIED
        job = pb.JobStatus(id=job_id, state=state, reason=mark)
        return pb.UpdateJobRequest(job=job, attempt=1).SerializeToString()

    def watch_request(self, job_id: str) -> bytes:
        return pb.WatchJobRequest(id=job_id).SerializeToString()

    def changes_in(self, message: bytes) -> int:
        """Return the number of changes in one message of a watch."""
        return 1

    def changes_of(self, client: Client, job_ids: Sequence[str]) -> int | None:
        """Return the number of changes to the jobs since `create`; None: the server counts none."""
        replies = client.call_all(self.read, [self.read_request(job_id) for job_id in job_ids])
        return sum(pb.GetJobResponse.FromString(reply).job.revision - 1 for reply in replies)


class BareApi(JobsApi):
    """Requests to the bare handlers, which store nothing."""

    def create(self, client: Client, job_ids: Sequence[str]) -> None:
        return

    def changes_of(self, client: Client, job_ids: Sequence[str]) -> int | None:
        return None


# The fields used here, of etcd's rpc.proto and kv.proto. A RangeRequest that leaves `serializable` unset is
# linearizable; its Response has the key. The key's version grows by one with each Put. A watch's Response has an event
# per change, several if the watcher lags. A Txn without conditions executes `success`. What begins like a RangeRequest
# (WatchCreateRequest) is declared as one.
_ETCD_PROTO = """
    name: "etcd.proto" package: "etcd" syntax: "proto3"
    message_type { name: "Range" field { name: "key" number: 1 type: TYPE_BYTES } }
    message_type {
        name: "Put" field { name: "key" number: 1 type: TYPE_BYTES } field { name: "value" number: 2 type: TYPE_BYTES }
    }
    message_type { name: "Operation" field { name: "put" number: 2 type: TYPE_MESSAGE type_name: ".etcd.Put" } }
    message_type {
        name: "Txn"
        field { name: "success" number: 2 type: TYPE_MESSAGE type_name: ".etcd.Operation" label: LABEL_REPEATED }
    }
    message_type { name: "Watch" field { name: "create" number: 1 type: TYPE_MESSAGE type_name: ".etcd.Range" } }
    message_type { name: "KeyValue" field { name: "version" number: 4 type: TYPE_INT64 } }
    message_type {
        name: "Response"
        field { name: "kvs" number: 2 type: TYPE_MESSAGE type_name: ".etcd.KeyValue" label: LABEL_REPEATED }
        field { name: "events" number: 11 type: TYPE_BYTES label: LABEL_REPEATED }
    }
"""
_pool = descriptor_pool.DescriptorPool()
_pool.Add(text_format.Parse(_ETCD_PROTO, descriptor_pb2.FileDescriptorProto()))
_ETCD: Mapping[str, Any] = message_factory.GetMessageClassesForFiles(["etcd.proto"], _pool)


class EtcdApi(JobsApi):
    """etcd's requests: a job is a key, its JobStatus message the value."""

    read = "/etcdserverpb.KV/Range"
    update = "/etcdserverpb.KV/Put"
    batch = "/etcdserverpb.KV/Txn"
    watch = "/etcdserverpb.Watch/Watch"
    ends_watches = False

    def create(self, client: Client, job_ids: Sequence[str]) -> None:
        client.call_all(self.update, [_put(job_at_work(job_id)).SerializeToString() for job_id in job_ids])

    def read_request(self, job_id: str) -> bytes:
        return bytes(_ETCD["etcd.Range"](key=job_id.encode()).SerializeToString())

    def updates(self, job_ids: Sequence[str]) -> Updates:
        puts = []
        for job in map(job_at_work, job_ids):
            job.reason, job.progress = "copying /srv/data", PLACEHOLDER
            puts.append(_put(job))
        request = puts[0] if len(puts) == 1 else _ETCD["etcd.Txn"](success=[{"put": put} for put in puts])
        return Updates(request.SerializeToString(), job_ids)

    def marked_request(self, job_id: str, mark: str, *, is_end: bool = False) -> bytes:
        job = job_at_work(job_id)
        job.reason = mark
        return bytes(_put(job).SerializeToString())

    def watch_request(self, job_id: str) -> bytes:
        return bytes(_ETCD["etcd.Watch"](create={"key": job_id.encode()}).SerializeToString())

    def changes_in(self, message: bytes) -> int:
        return len(_ETCD["etcd.Response"].FromString(message).events)

    def changes_of(self, client: Client, job_ids: Sequence[str]) -> int | None:
        replies = client.call_all(self.read, [self.read_request(job_id) for job_id in job_ids])
        return sum(int(_ETCD["etcd.Response"].FromString(reply).kvs[0].version) - 1 for reply in replies)


def _put(job: pb.JobStatus) -> Any:
    return _ETCD["etcd.Put"](key=job.id.encode(), value=job.SerializeToString())
