"""Each rule of the proto's comments as a check of its own, run on a server.

A check is a coroutine function; its docstring is the rule. It fails by raising BrokenRuleError with what was received.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import math
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

from google.protobuf import duration_pb2, struct_pb2
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.job.ids import new_uuid7
from jobstatus_grpc.verify.checker import name_of
from jobstatus_grpc.verify.history import Entry
from jobstatus_grpc.verify.recorder import Recorder, Stream

WATCH_SECONDS = 5.0
"""Time for an event of a watch to arrive."""


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of a check."""

    name: str
    rule: str
    seconds: float
    problem: str = ""
    """What was wrong; "": the rule is kept, or the check was skipped."""
    skipped: str = ""
    """Why the check was skipped."""


class Server:
    """Calls for the checks. The servers of the recorder take turns; jobs carry `labels`."""

    def __init__(self, recorder: Recorder, labels: Mapping[str, str]) -> None:
        self.labels = dict(labels)
        self.made: list[str] = []
        self._recorder = recorder
        self._calls = 0

    def new_id(self) -> str:
        """Return an id that is not in use."""
        self.made.append(f"verify-{uuid.uuid4().hex}")
        return self.made[-1]

    async def send(self, method: str, request: Any) -> Entry:
        """Make a call on the next server."""
        self._calls += 1
        entry = await self._recorder.call(method, request, server=self._calls % self._recorder.size)
        if entry.code == "PERMISSION_DENIED":
            raise SkippedError(entry.message)
        if entry.code == "RESOURCE_EXHAUSTED":
            raise SkippedError(f"the caller is limited: {entry.message}")
        return entry

    async def ok(self, method: str, request: Any) -> Any:
        """Make a call that must succeed, and return its response."""
        entry = await self.send(method, request)
        _expect(entry.response is not None, f"{method} was refused with {_said(entry)}")
        return entry.response

    async def refused(self, method: str, request: Any, code: str, reason: str) -> None:
        """Make a call that must be refused with this code and reason."""
        entry = await self.send(method, request)
        _expect((entry.code, entry.reason) == (code, reason), f"{method}: {_said(entry)} instead of {code} {reason}")

    async def create(self, **fields: Any) -> pb.JobStatus:
        """Create a job."""
        job = pb.JobStatus(id=self.new_id(), **fields)
        job.labels.update(self.labels)
        created: pb.JobStatus = (await self.ok("CreateJob", pb.CreateJobRequest(job=job))).job
        return created

    async def started(self, **fields: Any) -> pb.JobStatus:
        """Create a job that is IN_PROGRESS in attempt 1."""
        return await self.create(state=pb.JOB_STATE_IN_PROGRESS, **fields)

    async def update(self, job_id: str, *, attempt: int = 0, revision: int = 0, **fields: Any) -> pb.JobStatus:
        """Update a job, which must succeed."""
        request = _update(job_id, attempt=attempt, revision=revision, **fields)
        updated: pb.JobStatus = (await self.ok("UpdateJob", request)).job
        return updated

    async def succeeded(self) -> pb.JobStatus:
        """Return a job that is done."""
        job = await self.started()
        return await self.update(job.id, state=pb.JOB_STATE_SUCCEEDED)

    async def get(self, job_id: str) -> pb.JobStatus:
        """Read a job, which must exist."""
        job: pb.JobStatus = (await self.ok("GetJob", pb.GetJobRequest(id=job_id))).job
        return job

    def watch(self, method: str, request: Any) -> Any:
        """Receive a stream during an `async with` block."""
        self._calls += 1
        return self._recorder.watch(method, request, server=self._calls % self._recorder.size)

    @property
    def filter(self) -> pb.JobFilter:
        """All jobs of the checks."""
        return pb.JobFilter(labels=self.labels)


Check = Callable[[Server], Awaitable[None]]


class BrokenRuleError(Exception):
    """The server breaks the rule."""


class SkippedError(Exception):
    """The check cannot be run; the message says why."""


def _expect(condition: object, *received: object) -> None:
    # `assert` would check nothing under `python -O`.
    if not condition:
        raise BrokenRuleError(" ".join(map(str, received)))


def _update(job_id: str, *, attempt: int = 0, revision: int = 0, request_id: str = "", **fields: Any) -> Any:
    job = pb.JobStatus(id=job_id, **fields)
    return pb.UpdateJobRequest(job=job, attempt=attempt, expected_revision=revision, request_id=request_id)


def _said(entry: Entry) -> str:
    return f"{entry.code} {entry.reason}".strip() or "no end"


async def _until(stream: Stream, condition: Callable[[], object]) -> None:
    ends_at = time.monotonic() + WATCH_SECONDS
    while True:
        if stream.entry.code == "RESOURCE_EXHAUSTED":
            raise SkippedError(f"the caller is limited: {stream.entry.message}")
        if condition():
            return
        _expect(time.monotonic() < ends_at, f"not received within {WATCH_SECONDS:g} s: {_received(stream)}")
        await asyncio.sleep(0.002)


def _received(stream: Stream) -> str:
    names = [pb.JobEventType.Name(event.type) for event in _events(stream)]
    return ", ".join(names) or f"nothing ({stream.entry.code or 'open'})"


def _events(stream: Stream) -> list[Any]:
    messages = [message for _, message in stream.entry.responses]
    if stream.entry.method == "WatchJob":
        return [message.event for message in messages]
    return [event for message in messages for event in message.events]


# CreateJob


async def a_job_is_pending_by_default(server: Server) -> None:
    """A created job is PENDING, in attempt 0, at revision 1."""
    job = await server.create(name="a", labels={"b": "c"})
    _expect((job.state, job.attempt, job.revision, job.done) == (pb.JOB_STATE_PENDING, 0, 1, False), job)
    _expect((job.name, job.labels["b"]) == ("a", "c"), job)


async def a_job_created_in_progress_is_in_its_first_attempt(server: Server) -> None:
    """Creation in state IN_PROGRESS starts attempt 1."""
    job = await server.started()
    _expect((job.attempt, job.HasField("started_at")) == (1, True), job)


async def an_id_in_use_is_refused(server: Server) -> None:
    """ALREADY_EXISTS (JOB_ALREADY_EXISTS) if the id is in use."""
    job = await server.create()
    request = pb.CreateJobRequest(job=pb.JobStatus(id=job.id))
    await server.refused("CreateJob", request, "ALREADY_EXISTS", "JOB_ALREADY_EXISTS")


async def the_id_of_a_deleted_job_is_refused(server: Server) -> None:
    """ALREADY_EXISTS if the id was used by a job that was deleted within the last 24 hours."""
    job = await server.succeeded()
    await server.ok("DeleteJob", pb.DeleteJobRequest(id=job.id))
    request = pb.CreateJobRequest(job=pb.JobStatus(id=job.id))
    await server.refused("CreateJob", request, "ALREADY_EXISTS", "JOB_ALREADY_EXISTS")


async def a_created_id_is_chosen_by_the_service_if_empty(server: Server) -> None:
    """Without an id the service generates one; with a request_id a repeat returns the same job."""
    request = pb.CreateJobRequest(job=pb.JobStatus(labels=server.labels), request_id=uuid.uuid4().hex)
    first, second = [(await server.ok("CreateJob", request)).job for _ in range(2)]
    server.made.append(first.id)
    _expect(first.id, first)
    _expect((first.id, first.revision) == (second.id, second.revision), second)


async def a_job_cannot_be_created_done(server: Server) -> None:
    """INVALID_ARGUMENT (INVALID_FIELD) for the creation of a job in a final state."""
    request = pb.CreateJobRequest(job=pb.JobStatus(id=server.new_id(), state=pb.JOB_STATE_SUCCEEDED))
    await server.refused("CreateJob", request, "INVALID_ARGUMENT", "INVALID_FIELD")


async def an_invalid_id_is_refused(server: Server) -> None:
    """An id has 1 to 128 characters of A-Z, a-z, 0-9, ".", "_", ":" and "-"."""
    for job_id in ("a b", "ä", "a" * 129, "a/b"):
        request = pb.CreateJobRequest(job=pb.JobStatus(id=job_id))
        await server.refused("CreateJob", request, "INVALID_ARGUMENT", "INVALID_FIELD")


async def output_only_fields_are_ignored(server: Server) -> None:
    """Fields marked "output only" are ignored in requests."""
    job = await server.create(revision=7, attempt=3, done=True, stalled=True, cancel_requested=True)
    _expect(
        (job.revision, job.attempt, job.done, job.stalled, job.cancel_requested) == (1, 0, False, False, False), job
    )


# GetJob


async def an_unknown_job_is_not_found(server: Server) -> None:
    """NOT_FOUND with JOB_NOT_FOUND, from each call that names a job."""
    unknown = f"verify-{uuid.uuid4().hex}"
    for method, request in (
        ("GetJob", pb.GetJobRequest(id=unknown)),
        ("UpdateJob", _update(unknown, reason="a")),
        ("CancelJob", pb.CancelJobRequest(id=unknown)),
        ("DeleteJob", pb.DeleteJobRequest(id=unknown)),
        ("ListJobTransitions", pb.ListJobTransitionsRequest(id=unknown)),
    ):
        await server.refused(method, request, "NOT_FOUND", "JOB_NOT_FOUND")


async def a_deleted_job_has_expired(server: Server) -> None:
    """NOT_FOUND with JOB_EXPIRED if the job was deleted within the last 24 hours."""
    job = await server.succeeded()
    await server.ok("DeleteJob", pb.DeleteJobRequest(id=job.id))
    await server.refused("GetJob", pb.GetJobRequest(id=job.id), "NOT_FOUND", "JOB_EXPIRED")
    await server.refused("UpdateJob", _update(job.id, reason="a"), "NOT_FOUND", "JOB_EXPIRED")


async def a_read_returns_the_latest_write(server: Server) -> None:
    """GetJob returns a job as of the latest committed write, on each server."""
    job = await server.started()
    for number in range(10):
        updated = await server.update(job.id, reason=f"step {number}")
        _expect((await server.get(job.id)) == updated, "another job than the response to the last write")


# UpdateJob


async def a_change_raises_the_revision_by_one(server: Server) -> None:
    """The revision increases by exactly 1 with each change; updated_at never moves backwards."""
    before = await server.started()
    for number in range(5):
        job = await server.update(before.id, reason=f"step {number}")
        _expect(job.revision == before.revision + 1, job)
        _expect(job.updated_at.ToNanoseconds() >= before.updated_at.ToNanoseconds(), job)
        before = job


async def a_heartbeat_changes_nothing(server: Server) -> None:
    """An update that changes nothing is a heartbeat: the revision stays."""
    job = await server.started(reason="a")
    for request in (_update(job.id), _update(job.id, reason="a"), _update(job.id, attempt=1)):
        _expect((await server.ok("UpdateJob", request)).job.revision == job.revision)


async def lower_progress_does_not_count(server: Server) -> None:
    """Within one attempt a lower progress does not change the stored one; the rest of the update applies."""
    job = await server.started()
    await server.update(job.id, progress=50)
    job = await server.update(job.id, progress=40, reason="a")
    _expect((job.progress, job.reason, job.reports_progress) == (50, "a", True), job)


async def invalid_progress_is_refused(server: Server) -> None:
    """Progress is 0 to 100, and no NaN or infinity; nothing is written."""
    job = await server.started()
    for progress in (math.nan, math.inf, -math.inf, -0.1, 100.1):
        request = _update(job.id, progress=progress, reason="a")
        await server.refused("UpdateJob", request, "INVALID_ARGUMENT", "INVALID_FIELD")
    _expect((await server.get(job.id)) == job)


async def a_claim_names_the_next_attempt(server: Server) -> None:
    """With state IN_PROGRESS and an attempt the update is a claim, and must name the job's attempt plus one."""
    job = await server.create()
    claims = [_update(job.id, state=pb.JOB_STATE_IN_PROGRESS, attempt=attempt) for attempt in (1, 1, 3)]
    _expect((await server.ok("UpdateJob", claims[0])).job.attempt == 1)
    for claim in claims[1:]:
        await server.refused("UpdateJob", claim, "FAILED_PRECONDITION", "STALE_ATTEMPT")


async def a_claim_has_one_winner(server: Server) -> None:
    """Of simultaneous claims of one attempt, one succeeds."""
    job = await server.create()
    claim = _update(job.id, state=pb.JOB_STATE_IN_PROGRESS, attempt=1)
    entries = await asyncio.gather(*(server.send("UpdateJob", claim) for _ in range(10)))
    _expect(sorted(entry.code for entry in entries) == ["FAILED_PRECONDITION"] * 9 + ["OK"], [*map(_said, entries)])


async def a_replaced_worker_cannot_write(server: Server) -> None:
    """A write of another attempt than the job's is refused with STALE_ATTEMPT."""
    job = await server.started()
    await server.update(job.id, state=pb.JOB_STATE_IN_PROGRESS, attempt=2)
    for request in (_update(job.id, reason="a", attempt=1), _update(job.id, state=pb.JOB_STATE_SUCCEEDED, attempt=1)):
        await server.refused("UpdateJob", request, "FAILED_PRECONDITION", "STALE_ATTEMPT")


async def a_revision_is_compared(server: Server) -> None:
    """An expected_revision must equal the job's, else ABORTED (REVISION_MISMATCH)."""
    job = await server.started()
    _expect((await server.update(job.id, revision=job.revision, reason="a")).revision == job.revision + 1)
    request = _update(job.id, revision=job.revision, reason="b")
    await server.refused("UpdateJob", request, "ABORTED", "REVISION_MISMATCH")


async def a_revision_has_one_winner(server: Server) -> None:
    """Of simultaneous writes that expect one revision, one succeeds."""
    job = await server.started()
    requests = [_update(job.id, revision=job.revision, reason=str(number)) for number in range(10)]
    entries = await asyncio.gather(*(server.send("UpdateJob", request) for request in requests))
    _expect(sorted(entry.code for entry in entries) == ["ABORTED"] * 9 + ["OK"], [*map(_said, entries)])


async def a_request_takes_effect_once(server: Server) -> None:
    """A request with a request_id takes effect once; a repeat returns the job in its current state."""
    job = await server.started()
    request = _update(job.id, reason="a", request_id="r")
    first = (await server.ok("UpdateJob", request)).job
    later = await server.update(job.id, reason="b")
    again = (await server.ok("UpdateJob", request)).job
    _expect((first.revision, again) == (job.revision + 1, later), again)


async def an_old_request_takes_effect_once(server: Server) -> None:
    """A request takes effect once, even if 100 others have followed since."""
    job = await server.started()
    request = _update(job.id, reason="a", request_id="r")
    await server.ok("UpdateJob", request)
    others = [_update(job.id, reason=str(number), request_id=str(number)) for number in range(100)]
    later = [(await server.ok("UpdateJob", other)).job for other in others][-1]
    again = (await server.ok("UpdateJob", request)).job
    _expect(again == later, again)


async def a_request_that_changed_nothing_changes_nothing_later(server: Server) -> None:
    """A repeat of a request that changed nothing changes nothing, even if the job has changed since."""
    job = await server.started(reason="a")
    request = _update(job.id, reason="a", request_id="r")
    unchanged = (await server.ok("UpdateJob", request)).job
    later = await server.update(job.id, reason="b")
    again = (await server.ok("UpdateJob", request)).job
    _expect((unchanged.revision, again) == (job.revision, later), again)


async def a_request_id_that_is_too_old_is_refused(server: Server) -> None:
    """A new request whose request_id is a UUIDv7 of days ago is FAILED_PRECONDITION (REQUEST_ID_TOO_OLD)."""
    job = await server.started()
    days_ago = datetime.now(timezone.utc) - timedelta(days=3)
    request = _update(job.id, reason="a", request_id=new_uuid7(days_ago))
    await server.refused("UpdateJob", request, "FAILED_PRECONDITION", "REQUEST_ID_TOO_OLD")


async def simultaneous_repeats_take_effect_once(server: Server) -> None:
    """Repeats of a request that are sent at the same time take effect once."""
    job = await server.create()
    # A second effect would be the claim of an attempt that is taken.
    request = _update(job.id, state=pb.JOB_STATE_IN_PROGRESS, attempt=1, request_id="r")
    await asyncio.gather(*(server.ok("UpdateJob", request) for _ in range(10)))
    _expect((await server.get(job.id)).revision == job.revision + 1)


async def a_request_id_belongs_to_one_request(server: Server) -> None:
    """A different request with the same request_id is INVALID_ARGUMENT (REQUEST_ID_REUSED)."""
    job = await server.started()
    await server.ok("UpdateJob", _update(job.id, reason="a", request_id="r"))
    request = _update(job.id, reason="b", request_id="r")
    await server.refused("UpdateJob", request, "INVALID_ARGUMENT", "REQUEST_ID_REUSED")


async def a_missing_job_is_created_if_allowed(server: Server) -> None:
    """With allow_missing an update of an unknown id creates the job first."""
    request = _update(server.new_id(), reason="a", labels=server.labels)
    request.allow_missing = True
    job = (await server.ok("UpdateJob", request)).job
    _expect((job.reason, dict(job.labels)) == ("a", server.labels), job)


async def a_mask_selects_and_clears(server: Server) -> None:
    """Fields in the mask and unset in job are cleared; others are ignored; an empty mask writes nothing."""
    job = await server.started(reason="a")
    request = _update(job.id, reason="ignored", progress=5)
    request.update_mask.SetInParent()
    _expect((await server.ok("UpdateJob", request)).job == job)
    request = _update(job.id, progress=5)
    request.update_mask.paths.append("reason")
    updated = (await server.ok("UpdateJob", request)).job
    _expect((updated.reason, updated.HasField("progress")) == ("", False), updated)


async def an_unknown_mask_is_refused(server: Server) -> None:
    """A mask with an unknown field, or one that only the service sets, is INVALID_FIELD."""
    job = await server.started()
    for path in ("no_such_field", "revision", "id", "state.name"):
        request = _update(job.id, reason="a")
        request.update_mask.paths.append(path)
        await server.refused("UpdateJob", request, "INVALID_ARGUMENT", "INVALID_FIELD")


async def a_done_job_never_changes(server: Server) -> None:
    """A done job refuses updates with ILLEGAL_TRANSITION; only the repeat of its end is accepted, without effect."""
    job = await server.succeeded()
    _expect((job.done, job.HasField("finished_at"), job.HasField("expires_at")) == (True, True, True), job)
    _expect((await server.update(job.id, state=pb.JOB_STATE_SUCCEEDED)) == job)
    for request in (
        _update(job.id, reason="late"),
        _update(job.id, state=pb.JOB_STATE_FAILED, error=pb.JobError(message="late")),
        _update(job.id, state=pb.JOB_STATE_IN_PROGRESS),
        _update(job.id, state=pb.JOB_STATE_SUCCEEDED, reason="another"),
    ):
        await server.refused("UpdateJob", request, "FAILED_PRECONDITION", "ILLEGAL_TRANSITION")
    _expect((await server.get(job.id)) == job)


async def a_failed_job_has_an_error(server: Server) -> None:
    """`error` is always set in FAILED, and INVALID_FIELD in IN_PROGRESS."""
    job = await server.started()
    request = _update(job.id, error=pb.JobError(message="a"))
    await server.refused("UpdateJob", request, "INVALID_ARGUMENT", "INVALID_FIELD")
    failed = await server.update(job.id, state=pb.JOB_STATE_FAILED)
    _expect(failed.HasField("error"), failed)


async def values_come_back_as_they_were(server: Server) -> None:
    """Text of any script, labels and results are stored and returned unchanged."""
    result = struct_pb2.Struct()
    result.update({"rows": 12, "deep": {"list": [1.5, "x", None, True]}})
    job = await server.started(name="naïve 测试 🙂", reason="line\n\ttab")
    job = await server.update(job.id, result=result, labels={"a": "ü", **server.labels})
    _expect((job.name, job.reason, job.labels["a"], job.result) == ("naïve 测试 🙂", "line\n\ttab", "ü", result), job)


async def limits_are_enforced(server: Server) -> None:
    """A reason of 4,096 bytes is accepted, one of 4,097 is INVALID_FIELD; so with 64 and 65 labels."""
    job = await server.started()
    await server.update(job.id, reason="r" * 4096)
    await server.update(job.id, labels={**{f"l{n}": "" for n in range(64 - len(server.labels))}, **server.labels})
    for request in (
        _update(job.id, reason="r" * 4097),
        _update(job.id, labels={f"l{n}": "" for n in range(65)}),
        _update(job.id, reason="a\0b"),
    ):
        await server.refused("UpdateJob", request, "INVALID_ARGUMENT", "INVALID_FIELD")


# BatchUpdateJobs


async def updates_of_a_batch_are_independent(server: Server) -> None:
    """The updates of a batch take effect in order, and each succeeds or fails by itself."""
    job, done = await server.started(), await server.succeeded()
    updates = [
        _update(job.id, progress=10),
        _update(done.id, progress=10),
        _update(f"verify-{uuid.uuid4().hex}", progress=10),
        _update(job.id, progress=20),
    ]
    results = (await server.ok("BatchUpdateJobs", pb.BatchUpdateJobsRequest(updates=updates))).results
    _expect([result.error.reason for result in results] == ["", "ILLEGAL_TRANSITION", "JOB_NOT_FOUND", ""], results)
    _expect((results[3].job.progress, results[3].job.revision) == (20, job.revision + 2), results)


async def a_batch_has_500_updates_at_most(server: Server) -> None:
    """A batch with 501 updates is INVALID_ARGUMENT (INVALID_FIELD)."""
    job = await server.started()
    request = pb.BatchUpdateJobsRequest(updates=[_update(job.id, progress=1)] * 501)
    await server.refused("BatchUpdateJobs", request, "INVALID_ARGUMENT", "INVALID_FIELD")


# CancelJob, DeleteJob


async def a_pending_job_is_cancelled_at_once(server: Server) -> None:
    """A PENDING job becomes CANCELLED at once, with the reason; a repeat changes nothing."""
    job = await server.create()
    request = pb.CancelJobRequest(id=job.id, reason="not needed")
    cancelled = (await server.ok("CancelJob", request)).job
    _expect((cancelled.state, cancelled.cancel_reason) == (pb.JOB_STATE_CANCELLED, "not needed"), cancelled)
    _expect((await server.ok("CancelJob", request)).job == cancelled)


async def a_running_job_is_asked_to_stop(server: Server) -> None:
    """A job that is IN_PROGRESS gets cancel_requested, which its worker receives with its next update."""
    job = await server.started()
    asked = (await server.ok("CancelJob", pb.CancelJobRequest(id=job.id))).job
    _expect((asked.state, asked.cancel_requested) == (pb.JOB_STATE_IN_PROGRESS, True), asked)
    _expect((await server.update(job.id, progress=1)).cancel_requested)
    _expect((await server.update(job.id, state=pb.JOB_STATE_CANCELLED)).done)


async def an_open_job_is_not_deleted(server: Server) -> None:
    """DeleteJob of a job that is not done is FAILED_PRECONDITION (JOB_NOT_DONE)."""
    job = await server.started()
    await server.refused("DeleteJob", pb.DeleteJobRequest(id=job.id), "FAILED_PRECONDITION", "JOB_NOT_DONE")


async def a_deletion_compares_the_revision(server: Server) -> None:
    """DeleteJob with an expected_revision that is not the job's is ABORTED (REVISION_MISMATCH)."""
    job = await server.succeeded()
    request = pb.DeleteJobRequest(id=job.id, expected_revision=job.revision - 1)
    await server.refused("DeleteJob", request, "ABORTED", "REVISION_MISMATCH")
    await server.ok("DeleteJob", pb.DeleteJobRequest(id=job.id, expected_revision=job.revision))


# ListJobs, ListJobTransitions


async def a_list_is_complete_in_pages(server: Server) -> None:
    """The pages have each job once, newest created first, also while jobs are added."""
    group = uuid.uuid4().hex
    made = [await server.create(name=group) for _ in range(7)]
    request = pb.ListJobsRequest(filter=pb.JobFilter(names=[group]), page_size=3)
    listed: list[str] = []
    while True:
        response = await server.ok("ListJobs", request)
        listed += [job.id for job in response.jobs]
        request.page_token = response.next_page_token
        if not request.page_token:
            break
        await server.create(name=group)
    _expect(
        [job_id for job_id in listed if job_id in {job.id for job in made}] == [job.id for job in made[::-1]], listed
    )
    _expect(len(listed) == len(set(listed)), listed)


async def filters_select(server: Server) -> None:
    """A job matches a filter if it matches every field that is set."""
    job = await server.started(name=f"n-{uuid.uuid4().hex}", parent_id="p", labels={"k": "v"})
    for wanted, is_match in (
        (pb.JobFilter(ids=[job.id]), True),
        (pb.JobFilter(names=[job.name], states=[pb.JOB_STATE_IN_PROGRESS, pb.JOB_STATE_FAILED]), True),
        (pb.JobFilter(names=[job.name], states=[pb.JOB_STATE_FAILED]), False),
        (pb.JobFilter(name_prefix=job.name[:-1], labels={"k": "v"}), True),
        (pb.JobFilter(names=[job.name], labels={"k": "w"}), False),
        (pb.JobFilter(names=[job.name], parent_id="p", done=False), True),
        (pb.JobFilter(names=[job.name], done=True), False),
        (pb.JobFilter(names=[job.name], created_after=job.created_at), True),
        (pb.JobFilter(names=[job.name], created_before=job.created_at), False),
        (pb.JobFilter(names=[job.name], stalled=True), False),
    ):
        listed = (await server.ok("ListJobs", pb.ListJobsRequest(filter=wanted))).jobs
        _expect((job.id in {found.id for found in listed}) is is_match, wanted)


async def a_job_is_listed_by_its_present_labels(server: Server) -> None:
    """After its labels were replaced, a job matches the new ones and not the old ones."""
    old, new = ({**server.labels, "color": color} for color in ("red", "green"))
    job = await server.create(labels=old)
    await server.update(job.id, labels=new)
    for labels, is_match in ((old, False), (new, True)):
        request = pb.ListJobsRequest(filter=pb.JobFilter(labels=labels))
        listed = (await server.ok("ListJobs", request)).jobs
        _expect((job.id in {found.id for found in listed}) is is_match, labels)


async def a_malformed_token_is_refused(server: Server) -> None:
    """A page_token that is malformed, or of another filter, is INVALID_ARGUMENT (INVALID_TOKEN)."""
    for _ in range(2):
        await server.create()
    page = await server.ok("ListJobs", pb.ListJobsRequest(filter=server.filter, page_size=1))
    other = pb.ListJobsRequest(filter=pb.JobFilter(names=["other"]), page_token=page.next_page_token)
    for request in (other, pb.ListJobsRequest(page_token="no token")):
        await server.refused("ListJobs", request, "INVALID_ARGUMENT", "INVALID_TOKEN")


async def the_history_has_each_transition(server: Server) -> None:
    """The history has each change of state and each claim, oldest first, with its revision."""
    job = await server.create()
    await server.update(job.id, state=pb.JOB_STATE_IN_PROGRESS, attempt=1)
    await server.update(job.id, state=pb.JOB_STATE_RETRYING)
    await server.update(job.id, state=pb.JOB_STATE_IN_PROGRESS, attempt=2)
    await server.update(job.id, state=pb.JOB_STATE_SUCCEEDED, reason="good")
    history = (await server.ok("ListJobTransitions", pb.ListJobTransitionsRequest(id=job.id))).transitions
    states = [pb.JobState.Name(entry.to_state).removeprefix("JOB_STATE_") for entry in history]
    _expect(states == ["PENDING", "IN_PROGRESS", "RETRYING", "IN_PROGRESS", "SUCCEEDED"], states)
    _expect([entry.revision for entry in history] == [1, 2, 3, 4, 5], history)
    _expect((history[-1].reason, history[-1].attempt, bool(history[-1].actor)) == ("good", 2, True), history[-1])


async def the_history_has_each_transition_of_a_batch(server: Server) -> None:
    """Transitions of one job in one batch are all in its history."""
    job = await server.create()
    states = (pb.JOB_STATE_IN_PROGRESS, pb.JOB_STATE_RETRYING, pb.JOB_STATE_IN_PROGRESS, pb.JOB_STATE_SUCCEEDED)
    updates = [_update(job.id, state=state) for state in states]
    await server.ok("BatchUpdateJobs", pb.BatchUpdateJobsRequest(updates=updates))
    history = (await server.ok("ListJobTransitions", pb.ListJobTransitionsRequest(id=job.id))).transitions
    _expect([entry.to_state for entry in history] == [pb.JOB_STATE_PENDING, *states], history)


# WatchJob


async def a_watch_sends_the_job_and_its_changes(server: Server) -> None:
    """A watch sends a SNAPSHOT at once, the newest state after each change, and ends with OK after the final state."""
    job = await server.started()
    async with server.watch("WatchJob", pb.WatchJobRequest(id=job.id)) as stream:
        await _until(stream, lambda: len(_events(stream)) == 1)
        asked = (await server.ok("CancelJob", pb.CancelJobRequest(id=job.id))).job
        await _until(stream, lambda: bool(_events(stream)[-1].job == asked))
        done = await server.update(job.id, state=pb.JOB_STATE_CANCELLED)
        await _until(stream, stream.ended.is_set)
    events = _events(stream)
    _expect(events[0].type == pb.JOB_EVENT_TYPE_SNAPSHOT, events[0])
    _expect({event.type for event in events[1:]} == {pb.JOB_EVENT_TYPE_UPDATED}, _received(stream))
    _expect((events[-1].job, stream.entry.code) == (done, "OK"), (events[-1], stream.entry.code))


async def a_watch_of_a_done_job_ends_at_once(server: Server) -> None:
    """A watch of a done job sends its SNAPSHOT and ends with OK."""
    job = await server.succeeded()
    async with server.watch("WatchJob", pb.WatchJobRequest(id=job.id)) as stream:
        await _until(stream, stream.ended.is_set)
    _expect(([event.job for event in _events(stream)], stream.entry.code) == ([job], "OK"), _received(stream))


async def a_watch_of_an_unknown_job_is_not_found(server: Server) -> None:
    """A watch of an unknown job ends with NOT_FOUND (JOB_NOT_FOUND)."""
    async with server.watch("WatchJob", pb.WatchJobRequest(id=f"verify-{uuid.uuid4().hex}")) as stream:
        await _until(stream, stream.ended.is_set)
    _expect((stream.entry.code, stream.entry.reason) == ("NOT_FOUND", "JOB_NOT_FOUND"), _said(stream.entry))


async def a_watch_gets_the_end_of_a_job_that_is_deleted(server: Server) -> None:
    """The final state is sent, even if the job is deleted immediately after its end."""
    job = await server.started()
    request = pb.WatchJobRequest(id=job.id, min_update_interval=_seconds(60))
    async with contextlib.AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(server.watch("WatchJob", request)) for _ in range(3)]
        for stream in streams:
            await _until(stream, functools.partial(_events, stream))
        await server.update(job.id, state=pb.JOB_STATE_SUCCEEDED)
        await server.ok("DeleteJob", pb.DeleteJobRequest(id=job.id))
        for stream in streams:
            await _until(stream, stream.ended.is_set)
            _expect(
                (_events(stream)[-1].job.state, stream.entry.code) == (pb.JOB_STATE_SUCCEEDED, "OK"),
                _said(stream.entry),
            )


async def a_quiet_watch_sends_heartbeats(server: Server) -> None:
    """A HEARTBEAT is sent if nothing else was sent for heartbeat_interval; it repeats the job."""
    job = await server.started()
    async with server.watch("WatchJob", pb.WatchJobRequest(id=job.id, heartbeat_interval=_seconds(1))) as stream:
        await _until(stream, lambda: len(_events(stream)) == 2)
    event = _events(stream)[1]
    _expect((event.type, event.job) == (pb.JOB_EVENT_TYPE_HEARTBEAT, job), event)


async def the_last_progress_is_sent(server: Server) -> None:
    """min_update_interval delays progress, and drops none that is the newest: it is sent when the interval is over."""
    job = await server.started()
    request = pb.WatchJobRequest(id=job.id, min_update_interval=_seconds(0.5))
    async with server.watch("WatchJob", request) as stream:
        await _until(stream, lambda: bool(_events(stream)))
        for progress in range(1, 6):
            job = await server.update(job.id, progress=progress)
        await _until(stream, lambda: bool(_events(stream)[-1].job == job))


async def an_invalid_interval_is_refused(server: Server) -> None:
    """heartbeat_interval is 1 s to 1 day, min_update_interval 0 to 1 day; else INVALID_FIELD."""
    job = await server.started()
    for intervals in ({"heartbeat_interval": _seconds(0.5)}, {"min_update_interval": _seconds(-1)}):
        async with server.watch("WatchJob", pb.WatchJobRequest(id=job.id, **intervals)) as stream:
            await _until(stream, stream.ended.is_set)
        _expect((stream.entry.code, stream.entry.reason) == ("INVALID_ARGUMENT", "INVALID_FIELD"), _said(stream.entry))


# WatchJobs


async def a_watch_of_many_jobs_begins_with_snapshots(server: Server) -> None:
    """Without a resume_token: a SNAPSHOT for every matching job, one SYNCED, then changes."""
    name = uuid.uuid4().hex
    made = [await server.started(name=name) for _ in range(3)]
    async with server.watch("WatchJobs", pb.WatchJobsRequest(filter=pb.JobFilter(names=[name]))) as stream:
        await _until(stream, lambda: pb.JOB_EVENT_TYPE_SYNCED in {event.type for event in _events(stream)})
        types = [event.type for event in _events(stream)]
        _expect(types == [pb.JOB_EVENT_TYPE_SNAPSHOT] * 3 + [pb.JOB_EVENT_TYPE_SYNCED], _received(stream))
        added = await server.create(name=name)
        done = await server.update(made[0].id, state=pb.JOB_STATE_SUCCEEDED)
        await _until(stream, lambda: done in [event.job for event in _events(stream)])
    _expect(added.id in {event.job.id for event in _events(stream)[4:]}, _received(stream))


async def a_watch_of_many_jobs_resumes(server: Server) -> None:
    """With a resume_token: the changes since that token, then SYNCED; also with the token of a list."""
    name = uuid.uuid4().hex
    wanted = pb.JobFilter(names=[name])
    before = await server.started(name=name)
    token = (await server.ok("ListJobs", pb.ListJobsRequest(filter=wanted))).resume_token
    changed = await server.update(before.id, reason="while away")
    added = await server.create(name=name)
    async with server.watch("WatchJobs", pb.WatchJobsRequest(filter=wanted, resume_token=token)) as stream:
        await _until(stream, lambda: pb.JOB_EVENT_TYPE_SYNCED in {event.type for event in _events(stream)})
    jobs = [event.job for event in _events(stream) if event.type == pb.JOB_EVENT_TYPE_UPDATED]
    _expect(changed in jobs, _received(stream))
    _expect(added in jobs, _received(stream))


async def a_job_that_stops_matching_is_removed(server: Server) -> None:
    """REMOVED with the whole job if it no longer matches, also if that happened before the watch resumed."""
    name = uuid.uuid4().hex
    wanted = pb.JobFilter(names=[name], states=[pb.JOB_STATE_PENDING])
    first, second = [await server.create(name=name) for _ in range(2)]
    async with server.watch("WatchJobs", pb.WatchJobsRequest(filter=wanted)) as stream:
        await _until(stream, lambda: pb.JOB_EVENT_TYPE_SYNCED in {event.type for event in _events(stream)})
        await server.update(first.id, state=pb.JOB_STATE_IN_PROGRESS)
        await _until(stream, lambda: _events(stream)[-1].type == pb.JOB_EVENT_TYPE_REMOVED)
        token = stream.entry.responses[-1][1].resume_token
    _expect(_events(stream)[-1].job.id == first.id, _received(stream))
    await server.update(second.id, state=pb.JOB_STATE_IN_PROGRESS)
    async with server.watch("WatchJobs", pb.WatchJobsRequest(filter=wanted, resume_token=token)) as stream:
        await _until(stream, lambda: pb.JOB_EVENT_TYPE_SYNCED in {event.type for event in _events(stream)})
    removed = [event.job.id for event in _events(stream) if event.type == pb.JOB_EVENT_TYPE_REMOVED]
    is_reset = pb.JOB_EVENT_TYPE_RESET in {event.type for event in _events(stream)}
    _expect(second.id in removed or is_reset, _received(stream))


async def a_job_whose_labels_change_leaves(server: Server) -> None:
    """REMOVED if a job no longer matches because its labels were replaced."""
    labels = {"color": uuid.uuid4().hex}
    job = await server.create(labels=labels)
    async with server.watch("WatchJobs", pb.WatchJobsRequest(filter=pb.JobFilter(labels=labels))) as stream:
        await _until(stream, lambda: pb.JOB_EVENT_TYPE_SYNCED in {event.type for event in _events(stream)})
        job = await server.update(job.id, labels=server.labels)
        await _until(stream, lambda: _events(stream)[-1].type == pb.JOB_EVENT_TYPE_REMOVED)
    _expect(_events(stream)[-1].job == job, _received(stream))


async def a_token_passes_no_change_that_is_held_back(server: Server) -> None:
    """Everything up to a resume_token has been sent: a change that min_update_interval delays comes after it."""
    name = uuid.uuid4().hex
    wanted = pb.JobFilter(names=[name])
    job, other = await server.started(name=name), await server.started(name=name)
    request = pb.WatchJobsRequest(filter=wanted, min_update_interval=_seconds(60))
    async with server.watch("WatchJobs", request) as stream:
        await _until(stream, lambda: pb.JOB_EVENT_TYPE_SYNCED in {event.type for event in _events(stream)})
        for progress in (1, 2, 3):
            job = await server.update(job.id, progress=progress)
        done = await server.update(other.id, state=pb.JOB_STATE_SUCCEEDED)
        await _until(stream, lambda: done in [event.job for event in _events(stream)])
        request.resume_token = stream.entry.responses[-1][1].resume_token
    async with server.watch("WatchJobs", request) as resumed:
        await _until(resumed, lambda: pb.JOB_EVENT_TYPE_SYNCED in {event.type for event in _events(resumed)})
    seen = [event.job for event in (*_events(stream), *_events(resumed))]
    _expect(job in seen, f"{_received(stream)}; after the resume {_received(resumed)}")


async def an_end_is_sent_before_the_removal(server: Server) -> None:
    """If a job is deleted after its end, UPDATED with its final state is sent before REMOVED."""
    name = uuid.uuid4().hex
    job = await server.started(name=name)
    async with server.watch("WatchJobs", pb.WatchJobsRequest(filter=pb.JobFilter(names=[name]))) as stream:
        await _until(stream, lambda: pb.JOB_EVENT_TYPE_SYNCED in {event.type for event in _events(stream)})
        done = await server.update(job.id, state=pb.JOB_STATE_SUCCEEDED)
        await server.ok("DeleteJob", pb.DeleteJobRequest(id=job.id))
        await _until(stream, lambda: _events(stream)[-1].type == pb.JOB_EVENT_TYPE_REMOVED)
    _expect(done in [event.job for event in _events(stream)], _received(stream))


async def a_resume_token_belongs_to_its_filter(server: Server) -> None:
    """A resume_token that is malformed or of another filter is INVALID_ARGUMENT (INVALID_TOKEN)."""
    token = (await server.ok("ListJobs", pb.ListJobsRequest(filter=server.filter))).resume_token
    other = pb.JobFilter(names=["other"])
    for request in (
        pb.WatchJobsRequest(filter=other, resume_token=token),
        pb.WatchJobsRequest(filter=server.filter, resume_token="no token"),
    ):
        async with server.watch("WatchJobs", request) as stream:
            await _until(stream, stream.ended.is_set)
        _expect((stream.entry.code, stream.entry.reason) == ("INVALID_ARGUMENT", "INVALID_TOKEN"), _said(stream.entry))


# Time


async def a_silent_job_becomes_stalled(server: Server) -> None:
    """A job without an update for heartbeat_timeout becomes stalled; its next update ends that."""
    job = await server.started(heartbeat_timeout=_seconds(1))
    async with server.watch("WatchJob", pb.WatchJobRequest(id=job.id)) as stream:
        await _until(stream, lambda: bool(_events(stream)) and _events(stream)[-1].job.stalled)
    _expect(not (await server.update(job.id)).stalled)


async def a_heartbeat_keeps_a_job_from_stalling(server: Server) -> None:
    """An update that changes nothing restarts the heartbeat_timeout."""
    timeout_seconds = 2.0
    job = await server.started(heartbeat_timeout=_seconds(timeout_seconds))
    updated_at = started_at = time.monotonic()
    while updated_at < started_at + 1.5 * timeout_seconds:
        await asyncio.sleep(timeout_seconds / 8)
        is_stalled = (await server.get(job.id)).stalled
        seconds = time.monotonic() - updated_at
        if seconds > timeout_seconds / 2:
            raise SkippedError("heartbeats took too long: this machine is slow, or its calls are limited")
        _expect(not is_stalled, f"stalled {seconds:.1f} s after a heartbeat")
        await server.update(job.id)
        updated_at = time.monotonic()


def _seconds(seconds: float) -> duration_pb2.Duration:
    duration = duration_pb2.Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


CHECKS: Sequence[Check] = [
    check
    for name, check in list(globals().items())
    if inspect.iscoroutinefunction(check) and check.__module__ == __name__ and not name.startswith("_")
]
"""All checks, in the order of this file."""

WAITING = (
    a_quiet_watch_sends_heartbeats,
    the_last_progress_is_sent,
    a_silent_job_becomes_stalled,
    a_heartbeat_keeps_a_job_from_stalling,
)
"""Checks that mostly wait: they run beside the others."""


async def run(
    recorder: Recorder, *, labels: Mapping[str, str], report: Callable[[Result], None]
) -> tuple[list[Result], int]:
    """Run all checks and delete their jobs, also if cancelled; `report` is called with each result, in their order.

    Return the results, and the number of jobs that are left.
    """
    server = Server(recorder, labels)
    results = []
    waiting: dict[Check, asyncio.Task[Result]] = {
        check: asyncio.create_task(_result_of(check, server)) for check in WAITING
    }
    try:
        for check in CHECKS:
            results.append(await (waiting.get(check) or _result_of(check, server)))
            report(results[-1])
    finally:
        for task in waiting.values():
            task.cancel()
        await asyncio.gather(*waiting.values(), return_exceptions=True)
        left = await recorder.delete(server.made)
        # Those whose ids the server made, in calls that were cancelled before the answer.
        listed = await recorder.call("ListJobs", pb.ListJobsRequest(filter=pb.JobFilter(labels=labels)))
        left += await recorder.delete(job.id for _, page in listed.responses for job in page.jobs)
    return results, left


async def _result_of(check: Check, server: Server) -> Result:
    started_at = time.monotonic()
    problem = skipped = ""
    try:
        await check(server)
    except SkippedError as error:
        skipped = str(error)
    except BrokenRuleError as error:
        problem = " ".join(str(error).split()) or "wrong response"
    rule = inspect.cleandoc(check.__doc__ or "")
    return Result(name_of(check), rule, time.monotonic() - started_at, problem, skipped)
