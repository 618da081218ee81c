"""ListJobTransitions."""

from __future__ import annotations

import pytest
from jobstatus.v1 import job_status_pb2 as pb

INVALID_TOKEN = ("INVALID_ARGUMENT", "INVALID_TOKEN")


def history(service, job_id, **fields) -> pb.ListJobTransitionsResponse:
    return service.stub.ListJobTransitions(pb.ListJobTransitionsRequest(id=job_id, **fields), timeout=20)


def test_a_history_has_actor_change_and_time_the_oldest_first(any_service, new_id):
    job = any_service.create(id=new_id(), reason="asked for")
    any_service.update(job.id, state="JOB_STATE_IN_PROGRESS", attempt=1)
    any_service.update(job.id, progress=5)
    any_service.cancel(job.id, reason="no longer needed")
    ended = any_service.update(job.id, state="JOB_STATE_ABORTED", reason="stopped")
    entries = history(any_service, job.id).transitions
    rows = [(entry.from_state, entry.to_state, entry.reason, entry.attempt, entry.revision) for entry in entries]
    assert rows == [
        (pb.JOB_STATE_UNSPECIFIED, pb.JOB_STATE_PENDING, "asked for", 0, 1),
        (pb.JOB_STATE_PENDING, pb.JOB_STATE_IN_PROGRESS, "", 1, 2),
        (pb.JOB_STATE_IN_PROGRESS, pb.JOB_STATE_IN_PROGRESS, "cancel requested: no longer needed", 1, 4),
        (pb.JOB_STATE_IN_PROGRESS, pb.JOB_STATE_ABORTED, "stopped", 1, 5),
    ]
    assert entries[-1].transitioned_at == ended.updated_at
    assert all(entry.actor.startswith("ipv4:127.0.0.1:") for entry in entries)


def test_a_history_comes_page_by_page(any_service, new_id):
    job = any_service.create(id=new_id())
    for attempt in range(1, 6):
        any_service.update(job.id, state="JOB_STATE_IN_PROGRESS", attempt=attempt)
    pages = [history(any_service, job.id, page_size=4)]
    pages.append(history(any_service, job.id, page_size=4, page_token=pages[0].next_page_token))
    assert [[entry.revision for entry in page.transitions] for page in pages] == [[1, 2, 3, 4], [5, 6]]
    assert not pages[1].next_page_token


def test_a_history_whose_oldest_entries_are_trimmed_between_two_pages_goes_on_with_the_next_that_is_kept(
    any_service, new_id
):
    job = any_service.create(id=new_id())
    claims = [
        pb.UpdateJobRequest(job=pb.JobStatus(id=job.id, state=pb.JOB_STATE_IN_PROGRESS), attempt=attempt)
        for attempt in range(1, 1101)
    ]
    any_service.batch(*claims[:100])
    token = history(any_service, job.id, page_size=2).next_page_token
    for start in range(100, 1100, 500):
        any_service.batch(*claims[start : start + 500])
    page = history(any_service, job.id, page_size=2, page_token=token)
    assert [entry.revision for entry in page.transitions] == [102, 103]


def test_a_page_that_is_just_full_is_the_last(any_service, new_id):
    job = any_service.job_in("SUCCEEDED", id=new_id())
    page = history(any_service, job.id, page_size=3)
    assert (len(page.transitions), page.next_page_token) == (3, "")


def test_a_page_of_long_reasons_ends_at_1_mib(any_service, new_id):
    job = any_service.create(id=new_id())
    claims = [
        pb.UpdateJobRequest(
            job=pb.JobStatus(id=job.id, state=pb.JOB_STATE_IN_PROGRESS, reason="x" * 4096), attempt=attempt
        )
        for attempt in range(1, 401)
    ]
    any_service.batch(*claims)
    first = history(any_service, job.id, page_size=1000)
    second = history(any_service, job.id, page_size=1000, page_token=first.next_page_token)
    assert first.ByteSize() < 1024 * 1024 + 5000
    assert [entry.revision for page in (first, second) for entry in page.transitions] == list(range(1, 402))


def test_a_token_is_for_its_own_job_only(any_service, new_id, refused):
    jobs = [any_service.job_in("SUCCEEDED", id=new_id()) for _ in range(2)]
    token = history(any_service, jobs[0].id, page_size=1).next_page_token
    assert refused(history, any_service, jobs[1].id, page_token=token).kind == INVALID_TOKEN
    assert refused(history, any_service, jobs[0].id, page_token=token[::-1]).kind == INVALID_TOKEN


def test_an_unknown_job_has_no_history(any_service, new_id, refused):
    assert refused(history, any_service, new_id()).kind == ("NOT_FOUND", "JOB_NOT_FOUND")


@pytest.mark.parametrize(("job_id", "page_size", "fields"), [("", 0, ["id"]), ("a b", -1, ["id", "page_size"])])
def test_all_violations_of_a_request_are_reported_at_once(service, refused, job_id, page_size, fields):
    assert refused(history, service, job_id, page_size=page_size).fields == fields
