"""Lists, histories and deletions: the requests, and what they return."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import grpc
import pytest
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc import (
    InternalError,
    InvalidTokenError,
    JobExpiredError,
    JobFilter,
    JobNotDoneError,
    JobNotFoundError,
    JobState,
    RevisionMismatchError,
)
from jobstatus_grpc.errors import DrainingError, TooManyRequestsError
from tests.support.scripted_server import ScriptedServer, a_job, fail, refuse, reply

SINCE = datetime(2030, 1, 2, 3, 4, 5, 678901, tzinfo=timezone.utc)
AWAY = fail(grpc.StatusCode.UNAVAILABLE)
DELETED = reply(pb.DeleteJobResponse())
GONE = refuse(JobExpiredError())


@pytest.fixture
def family(client, new_id):
    """Five jobs with one parent, oldest first."""
    parent = new_id()
    return [client.create(f"part {number}", parent_id=parent, labels={"a": "b"}) for number in range(5)]


def test_list_returns_the_newest_created_first(client, family):
    page = client.list(JobFilter(parent_id=family[0].parent_id))
    assert page.jobs == tuple(reversed(family))
    assert (page.next_page_token, page.resume_token != "") == ("", True)


def test_pages_follow_each_other(client, family):
    jobs_filter = JobFilter(parent_id=family[0].parent_id)
    first = client.list(jobs_filter, page_size=3)
    second = client.list(jobs_filter, page_size=3, page_token=first.next_page_token)
    assert first.jobs + second.jobs == tuple(reversed(family))
    assert (len(first.jobs), second.next_page_token) == (3, "")


def test_list_all_goes_through_all_pages(client, family):
    assert list(client.list_all(JobFilter(parent_id=family[0].parent_id), page_size=2)) == family[::-1]


def test_list_without_a_filter_means_all_jobs(client, family):
    assert client.list(page_size=5).jobs == tuple(reversed(family))


def test_a_token_of_another_filter_is_refused(client, family):
    token = client.list(JobFilter(parent_id=family[0].parent_id), page_size=1).next_page_token
    with pytest.raises(InvalidTokenError):
        client.list(JobFilter(names=["part 1"]), page_token=token)


def test_history_has_actor_and_change_oldest_first(client):
    job = client.create("n", reason="new")
    client.update(job.id, state=JobState.IN_PROGRESS, attempt=1)
    client.update(job.id, state=JobState.SUCCEEDED, reason="done")
    page = client.history(job.id)
    steps = [(step.from_state, step.to_state, step.attempt, step.revision) for step in page.transitions]
    assert steps == [
        (None, JobState.PENDING, 0, 1),
        (JobState.PENDING, JobState.IN_PROGRESS, 1, 2),
        (JobState.IN_PROGRESS, JobState.SUCCEEDED, 1, 3),
    ]
    assert (page.transitions[2].reason, page.next_page_token) == ("done", "")
    assert timedelta(0) <= page.transitions[0].transitioned_at - job.created_at < timedelta(minutes=1)
    assert page.transitions[0].actor


def test_a_history_comes_in_pages(client):
    job = client.create()
    client.update(job.id, state=JobState.FAILED)
    first = client.history(job.id, page_size=1)
    second = client.history(job.id, page_size=1, page_token=first.next_page_token)
    assert [step.revision for step in first.transitions + second.transitions] == [1, 2]


def test_the_history_of_an_unknown_job_is_not_found(client):
    with pytest.raises(JobNotFoundError):
        client.history("no-such-job")


def test_a_deleted_job_is_gone(client):
    job = client.update(client.create().id, state=JobState.ABORTED)
    with pytest.raises(RevisionMismatchError):
        client.delete(job.id, expected_revision=job.revision - 1)
    assert client.delete(job.id, expected_revision=job.revision) is None
    for again in (client.get, client.delete):
        with pytest.raises(JobExpiredError):
            again(job.id)


def test_a_job_that_is_not_done_is_not_deleted(client):
    with pytest.raises(JobNotDoneError):
        client.delete(client.create().id)


def test_a_deletion_that_was_tried_before_and_finds_nothing_has_succeeded(connect):
    with ScriptedServer(DeleteJob=[AWAY, GONE]) as server:
        assert connect(server.address).delete("a") is None
    assert len(server.requests["DeleteJob"]) == 2


@pytest.mark.parametrize("first", [TooManyRequestsError(), DrainingError()], ids=lambda error: error.reason)
def test_a_deletion_that_finds_nothing_fails_where_no_try_before_can_have_taken_effect(connect, first):
    first.retry_after_seconds = 0.05
    with ScriptedServer(DeleteJob=[refuse(first), GONE]) as server, pytest.raises(JobExpiredError):
        connect(server.address).delete("a")


def test_a_deletion_that_finds_nothing_at_once_fails(connect):
    with ScriptedServer(DeleteJob=[GONE]) as server, pytest.raises(JobExpiredError):
        connect(server.address).delete("a")


def test_a_deletion_is_tried_again(connect):
    with ScriptedServer(DeleteJob=[AWAY, DELETED]) as server:
        connect(server.address).delete("a", expected_revision=7)
    assert [request.expected_revision for request in server.requests["DeleteJob"]] == [7, 7]


def test_every_field_of_a_filter_is_sent(connect):
    everything = JobFilter(
        ids=["a"], states=[JobState.FAILED], names=["n"], name_prefix="p", labels={"k": "v"}, parent_id="q",
        created_after=SINCE, created_before=SINCE, done=False, stalled=True,
    )  # fmt: skip
    with ScriptedServer(ListJobs=[reply(pb.ListJobsResponse())]) as server:
        connect(server.address).list(everything)
    sent = server.requests["ListJobs"][0].filter
    assert {field.name for field, _ in sent.ListFields()} == {field.name for field in pb.JobFilter.DESCRIPTOR.fields}
    assert (sent.created_after.seconds, sent.created_after.nanos) == (int(SINCE.timestamp()), 678901000)


def test_a_page_may_be_short_and_not_the_last(connect):
    pages = [pb.ListJobsResponse(next_page_token="t"), pb.ListJobsResponse(jobs=[a_job()])]
    with ScriptedServer(ListJobs=[AWAY, *map(reply, pages)]) as server:
        assert [job.id for job in connect(server.address).list_all()] == ["a"]
    sent = [(request.page_size, request.page_token) for request in server.requests["ListJobs"]]
    assert sent == [(1000, ""), (1000, ""), (1000, "t")]


def test_a_history_with_states_from_the_future_can_be_read(connect):
    step = pb.JobTransition(from_state=99, to_state=98, revision=3)  # type: ignore[arg-type]
    with ScriptedServer(ListJobTransitions=[reply(pb.ListJobTransitionsResponse(transitions=[step]))]) as server:
        (transition,) = connect(server.address).history("a").transitions
    assert (transition.from_state, transition.to_state) == (JobState.IN_PROGRESS, JobState.IN_PROGRESS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("body", [b"\xff\xff", pb.ListJobsResponse(jobs=[a_job(created=2**60)]).SerializeToString()])
def test_a_page_that_makes_no_sense_is_an_internal_error(connect, body):
    with ScriptedServer(ListJobs=[lambda *call: body], ListJobTransitions=[lambda *call: b"\xff\xff"]) as server:
        client = connect(server.address)
        with pytest.raises(InternalError):
            client.list()
        with pytest.raises(InternalError):
            client.history("a")
