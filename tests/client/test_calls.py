"""Unary calls: the requests, and what they return."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc import (
    IllegalTransitionError,
    InvalidFieldError,
    Job,
    JobAlreadyExistsError,
    JobError,
    JobNotFoundError,
    JobState,
    JobUpdate,
    RequestIdReusedError,
    RevisionMismatchError,
    StaleAttemptError,
)
from jobstatus_grpc.errors import StoreFullError, error_classes
from tests.support.scripted_server import ScriptedServer, a_job, refuse, reply

ETA = datetime(2030, 1, 2, 3, 4, 5, 678901, tzinfo=timezone.utc)
EVERYTHING = {
    "reason": "copying",
    "reports_progress": True,
    "progress": 12.5,
    "estimated_completion": ETA,
    "heartbeat_timeout_seconds": 30,
    "labels": {"team": "a"},
    "result": {"files": [1, {"deep": None}], "ok": True},
}


def test_create_returns_the_job_as_stored(client, new_id):
    job_id = new_id()
    job = client.create("backup", id=job_id, parent_id="p", state=JobState.IN_PROGRESS, **EVERYTHING)
    assert (job.id, job.name, job.parent_id, job.state, job.attempt) == (job_id, "backup", "p", JobState.IN_PROGRESS, 1)
    assert (job.reason, job.reports_progress, job.progress, job.estimated_completion) == ("copying", True, 12.5, ETA)
    assert job.heartbeat_timeout == timedelta(seconds=30)
    assert (job.labels, job.result) == ({"team": "a"}, {"files": [1, {"deep": None}], "ok": True})
    assert client.get(job_id) == job


def test_create_leaves_the_id_to_the_service(client):
    assert client.create().id != client.create().id


def test_update_writes_what_is_given_and_nothing_else(client):
    job = client.create(**EVERYTHING)
    updated = client.update(job.id, progress=50)
    assert updated.progress == 50
    assert (updated.reason, updated.labels, updated.result) == (job.reason, job.labels, job.result)


@pytest.mark.parametrize("name", [*EVERYTHING, "error"])
def test_update_with_none_clears(client, name):
    job = client.create(**EVERYTHING, state=JobState.IN_PROGRESS)
    client.update(job.id, state=JobState.RETRYING, error=JobError(14, "away", "AWAY"))
    cleared = client.update(job.id, **{name: None})
    assert not getattr(cleared, name.removesuffix("_seconds"))


def test_update_without_a_change_is_a_heartbeat(client):
    job = client.create(**EVERYTHING)
    assert client.update(job.id) == job


def test_update_names_what_it_writes_in_its_mask(connect):
    with ScriptedServer(UpdateJob=[reply(pb.UpdateJobResponse(job=a_job()))]) as server:
        client = connect(server.address)
        client.update("a", progress=0, reason="", labels={})
        client.update("a", attempt=3)
    first, second = server.requests["UpdateJob"]
    assert sorted(first.update_mask.paths) == ["labels", "progress", "reason"]
    assert second.HasField("update_mask")
    assert (list(second.update_mask.paths), second.attempt) == ([], 3)


def test_update_carries_attempt_revision_and_what_is_missing(client, new_id):
    job_id = new_id()
    job = client.update(
        job_id, state=JobState.IN_PROGRESS, attempt=1, allow_missing=True, name="n", parent_id="p", labels={"a": "b"}
    )
    assert (job.name, job.parent_id, job.labels, job.attempt) == ("n", "p", {"a": "b"}, 1)
    assert client.update(job_id, progress=1, attempt=1, expected_revision=job.revision).progress == 1


def test_batch_update_answers_each_in_order(client):
    first, second = client.create(), client.create()
    done, missing, moved = client.batch_update(
        [
            JobUpdate(first.id, state=JobState.SUCCEEDED),
            JobUpdate("no-such-job", progress=1),
            JobUpdate(second.id, progress=7.5),
        ]
    )
    assert (done.id, done.state, moved.id, moved.progress) == (first.id, JobState.SUCCEEDED, second.id, 7.5)
    assert type(missing) is JobNotFoundError


def test_batch_update_takes_any_number_and_answers_each_in_order(client):
    job_ids = [client.create().id for _ in range(3)]
    updates = [JobUpdate(job_ids[number % 3], reason=str(number)) for number in range(1_200)]
    updates[700] = JobUpdate("no-such-job", reason="700")
    updates[900] = JobUpdate(job_ids[0], progress="x")  # type: ignore[arg-type]
    results = client.batch_update(updates)
    errors = {number: type(result) for number, result in enumerate(results) if not isinstance(result, Job)}
    assert errors == {700: JobNotFoundError, 900: InvalidFieldError}
    assert all(result.reason == str(number) for number, result in enumerate(results) if number not in errors)


def echo(request, context):
    results = [pb.BatchUpdateJobsResult(job=a_job(id=update.job.id)) for update in request.updates]
    return pb.BatchUpdateJobsResponse(results=results).SerializeToString()


def test_batch_update_keeps_each_call_below_the_body_limit_of_proxies(connect):
    large = {"text": "x" * 60_000}
    with ScriptedServer(BatchUpdateJobs=[echo]) as server:
        results = connect(server.address).batch_update(JobUpdate(str(number), result=large) for number in range(40))
        sizes = [request.ByteSize() for request in server.requests["BatchUpdateJobs"]]
    assert [job.id for job in results] == [str(number) for number in range(40)]
    assert max(sizes) < 1_000_000
    assert len(sizes) == 3


def test_a_batch_whose_second_call_fails_keeps_the_results_of_the_first(connect):
    updates = [JobUpdate(str(number), progress="x" if number == 1 else 1) for number in range(1_100)]  # type: ignore[arg-type]
    with ScriptedServer(BatchUpdateJobs=[echo, refuse(StoreFullError())]) as server:
        results = connect(server.address).batch_update(updates)
        assert len(server.requests["BatchUpdateJobs"]) == 2
    assert [type(result) for result in results[:502]] == [Job, InvalidFieldError, *[Job] * 499, StoreFullError]
    assert set(map(type, results[501:])) == {StoreFullError}
    with ScriptedServer(BatchUpdateJobs=[refuse(StoreFullError())]) as server, pytest.raises(StoreFullError):
        connect(server.address).batch_update(updates)


def test_an_update_that_is_too_large_names_the_field_and_is_not_sent(client):
    job, reason = client.create(), "x" * 1_000_000
    says = "reason: is too large: 1000004 bytes, and a call may have 1000000; put large data behind a URL"
    first, large, last = client.batch_update([JobUpdate(job.id), JobUpdate(job.id, reason=reason), JobUpdate(job.id)])
    assert (first.id, str(large), last.id) == (job.id, says, job.id)
    for call in (lambda: client.update(job.id, reason=reason), lambda: client.create(reason=reason)):
        with pytest.raises(InvalidFieldError) as caught:
            call()
        assert str(caught.value) == says


def test_cancel_returns_the_job(client):
    job = client.create()
    assert client.cancel(job.id, reason="no need").state is JobState.CANCELLED
    assert client.get(job.id).reason == "no need"


def test_errors_say_what_is_wrong_field_by_field(client):
    with pytest.raises(InvalidFieldError) as caught:
        client.create("x" * 300, progress=101)
    assert [violation.field for violation in caught.value.violations] == ["job.name", "job.progress"]


def test_errors_are_those_of_the_service(client, new_id):
    job = client.create(id=new_id(), state=JobState.IN_PROGRESS, request_id="one")
    with pytest.raises(JobAlreadyExistsError):
        client.create(id=job.id)
    with pytest.raises(RequestIdReusedError):
        client.update(job.id, progress=1, request_id="one")
    with pytest.raises(StaleAttemptError):
        client.update(job.id, progress=1, attempt=2)
    with pytest.raises(RevisionMismatchError):
        client.update(job.id, progress=1, expected_revision=9)
    with pytest.raises(IllegalTransitionError) as caught:
        client.update(job.id, state=JobState.PENDING)
    assert caught.value.metadata["to"] == "JOB_STATE_PENDING"


# A class without a reason of its own arrives as the one above it.
@pytest.mark.parametrize(
    "error", [cls for cls in error_classes() if vars(cls).get("reason")], ids=lambda cls: cls.reason
)
def test_every_error_arrives_as_its_class(connect, error):
    sent = error()
    sent.retry_after_seconds = 30  # so that no other try fits
    with ScriptedServer(GetJob=[refuse(sent)]) as server, pytest.raises(error) as caught:
        connect(server.address).get("a")
    assert type(caught.value) is error
