"""BatchUpdateJobs: many updates in their order, each on its own."""

from __future__ import annotations

import pytest
from jobstatus.v1 import job_status_pb2 as pb

MAX_UPDATES = 500
MAX_RESPONSE_BYTES = 1024 * 1024
LARGEST_JOB_BYTES = 96 * 1024


def test_updates_of_one_job_take_effect_in_their_order(any_service, update_of, new_id):
    job = any_service.job_in("IN_PROGRESS", id=new_id())
    results = any_service.batch(
        update_of(job.id, reason="a"),
        update_of(job.id, reason="b", expected_revision=job.revision + 1),
        update_of(job.id, state="JOB_STATE_RETRYING"),
        update_of(job.id, state="JOB_STATE_IN_PROGRESS", attempt=2),
        update_of(job.id, state="JOB_STATE_SUCCEEDED", attempt=2),
    )
    assert [result.job.revision for result in results] == [job.revision + step for step in range(1, 6)]
    assert [result.job.reason for result in results] == ["a", "b", "b", "b", "b"]
    assert any_service.get(job.id) == results[-1].job


def test_500_updates_of_one_job_are_500_revisions(any_service, update_of, new_id):
    job = any_service.job_in("IN_PROGRESS", id=new_id())
    results = any_service.batch(*(update_of(job.id, reason=str(number)) for number in range(MAX_UPDATES)))
    assert [result.job.reason for result in results] == [str(number) for number in range(MAX_UPDATES)]
    assert any_service.get(job.id).revision == job.revision + MAX_UPDATES


def test_more_than_500_updates_are_refused_whole(any_service, update_of, refused, new_id):
    job = any_service.job_in("IN_PROGRESS", id=new_id())
    updates = [update_of(job.id, reason=str(number)) for number in range(MAX_UPDATES + 1)]
    refusal = refused(any_service.batch, *updates)
    assert (refusal.kind, refusal.fields) == (("INVALID_ARGUMENT", "INVALID_FIELD"), ["updates"])
    assert any_service.get(job.id) == job


def test_an_empty_batch_has_no_results(any_service):
    assert any_service.batch() == []


def refused_updates(service, update_of, new_id):
    """Updates that are refused, each with another reason."""
    running, done = service.job_in("IN_PROGRESS", id=new_id()), service.job_in("SUCCEEDED", id=new_id())
    service.update(running.id, reason="used", request_id="used")
    return [
        update_of(new_id(), progress=1),
        update_of("no id", progress=1),
        update_of("", progress=1),
        update_of(running.id, progress=101, reason="\0", attempt=-1, mask=["progress", "reason", "id"]),
        update_of(running.id, reason="other", request_id="used"),
        update_of(running.id, progress=1, attempt=2),
        update_of(running.id, progress=1, expected_revision=77),
        update_of(running.id, state="JOB_STATE_PENDING"),
        update_of(done.id, progress=1),
        update_of(running.id, error={"code": 3}),
        update_of(running.id, labels={"ü" * 63: "\0"}),
        update_of(running.id, mask=[f"path-{number}" for number in range(50)]),
    ]


def test_an_error_stands_in_its_place_and_stops_no_other(any_service, update_of, new_id):
    job = any_service.job_in("IN_PROGRESS", id=new_id())
    bad = refused_updates(any_service, update_of, new_id)
    mixed = [update for number, wrong in enumerate(bad, 1) for update in (wrong, update_of(job.id, progress=number))]
    results = any_service.batch(*mixed)
    assert [result.WhichOneof("result") for result in results] == ["error", "job"] * len(bad)
    assert [result.job.progress for result in results[1::2]] == list(range(1, len(bad) + 1))
    assert any_service.get(job.id) == results[-1].job


def test_an_error_is_the_one_that_its_own_call_would_return(any_service, update_of, refused, new_id):
    for update in refused_updates(any_service, update_of, new_id):
        (result,) = any_service.batch(update)
        alone = refused(any_service.stub.UpdateJob, update)
        seen = (result.error.code, result.error.message, result.error.reason)
        assert seen == (alone.code.value[0], alone.message, alone.reason)


def test_a_batch_of_errors_writes_nothing(any_service, update_of, refused, new_id):
    bad = refused_updates(any_service, update_of, new_id)
    jobs = {update.job.id for update in bad[4:]}
    before = [any_service.get(job_id) for job_id in jobs]
    any_service.batch(*bad)
    assert [any_service.get(job_id) for job_id in jobs] == before
    assert refused(any_service.get, bad[0].job.id).reason == "JOB_NOT_FOUND"


def test_jobs_in_results_leave_out_their_result(any_service, update_of, new_id):
    job = any_service.job_in("IN_PROGRESS", id=new_id())
    (result,) = any_service.batch(update_of(job.id, result={"rows": 1}, reason="x"))
    stored = any_service.get(job.id)
    assert stored.result["rows"] == 1
    stored.ClearField("result")
    assert result.job == stored


def test_a_batch_replayed_has_one_effect(any_service, update_of, new_id):
    job = any_service.job_in("IN_PROGRESS", id=new_id())
    updates = [update_of(job.id, reason=str(number), request_id=f"r{number}") for number in range(10)]
    last = any_service.batch(*updates)[-1].job
    assert [result.job for result in any_service.batch(*updates)] == [last] * 10


def test_of_two_claims_in_one_batch_the_first_wins(any_service, update_of, new_id):
    job = any_service.create(id=new_id())
    claim = {"state": "JOB_STATE_IN_PROGRESS", "attempt": 1}
    first, second = any_service.batch(
        update_of(job.id, **claim, request_id="a"), update_of(job.id, **claim, request_id="b")
    )
    assert (first.job.attempt, second.error.reason) == (1, "STALE_ATTEMPT")


def test_a_batch_can_create_a_job_and_go_on_with_it(any_service, update_of, new_id):
    job_id = new_id()
    results = any_service.batch(
        update_of(job_id, allow_missing=True, state="JOB_STATE_IN_PROGRESS", attempt=1),
        update_of(job_id, progress=50, attempt=1),
        update_of(job_id, state="JOB_STATE_SUCCEEDED", attempt=1),
    )
    assert [(result.job.revision, result.job.attempt) for result in results] == [(1, 1), (2, 1), (3, 1)]
    assert any_service.get(job_id).state == pb.JOB_STATE_SUCCEEDED


def test_a_reply_stays_within_1_mib_plus_one_job_and_every_result_can_be_used(service, update_of, new_id):
    labels = {f"{number:063}": "v" * 256 for number in range(64)}
    job = service.job_in("IN_PROGRESS", id=new_id(), name="n" * 256, labels=labels)
    updates = [update_of(job.id, attempt=1, reason=f"{number:04096}") for number in range(MAX_UPDATES)]
    results = service.batch(*updates)
    assert pb.BatchUpdateJobsResponse(results=results).ByteSize() <= MAX_RESPONSE_BYTES + LARGEST_JOB_BYTES
    for number, result in enumerate(results, 1):
        seen = (result.job.id, result.job.revision, result.job.attempt, result.job.state)
        assert seen == (job.id, job.revision + number, 1, pb.JOB_STATE_IN_PROGRESS)


def test_a_reply_of_many_wordy_errors_stays_within_its_limit(service, update_of, new_id):
    keys = [chr(0x1F600 + number) * 63 for number in range(8)]
    updates = [update_of("a", labels=dict.fromkeys(keys, "")) for _ in range(MAX_UPDATES)]
    results = service.batch(*updates)
    assert [result.error.reason for result in results] == ["INVALID_FIELD"] * MAX_UPDATES
    assert pb.BatchUpdateJobsResponse(results=results).ByteSize() <= MAX_RESPONSE_BYTES + LARGEST_JOB_BYTES


@pytest.mark.parametrize("state", ["PENDING", "IN_PROGRESS"])
def test_a_heartbeat_in_a_batch_answers_with_the_job(any_service, update_of, new_id, state):
    job = any_service.job_in(state, id=new_id())
    (result,) = any_service.batch(update_of(job.id))
    assert result.job == job
