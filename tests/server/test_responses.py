"""Responses as bytes: equal to what protobuf serialises, and rendered in turns of the event loop."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta, timezone

import pytest
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.auth import Identity
from jobstatus_grpc.job import (
    JOB_FIELDS,
    REPORT_FIELDS,
    Job,
    JobError,
    JobState,
    evolve,
    is_report,
    is_urgent,
    projection_of,
)
from jobstatus_grpc.server import responses
from jobstatus_grpc.server.requests import to_jobs_query
from jobstatus_grpc.server.responses import JOBS_PER_TURN, MAX_KEPT_BYTES, job_event, jobs_reply, render_job
from jobstatus_grpc.stores.interface import Page
from jobstatus_grpc.wire import convert
from tests.support.jobs import job_in

START = datetime(2026, 1, 1, tzinfo=timezone.utc)
JOB = Job(
    id="a", state=JobState.IN_PROGRESS, created_at=START, updated_at=START + timedelta(seconds=10), name="n",
    reports_progress=True, progress=50.0, started_at=START, attempt=1, labels={"k": "v"}, revision=2,
)  # fmt: skip
CHANGES = {
    "id": "b", "state": JobState.RETRYING, "created_at": START - timedelta(1), "updated_at": START + timedelta(1),
    "name": "m", "reason": "r", "reports_progress": False, "progress": 75.0, "estimated_completion": START,
    "error": JobError(3), "started_at": None, "finished_at": START, "attempt": 2, "cancel_requested": True,
    "cancel_reason": "c",
    "stalled": True, "heartbeat_timeout": timedelta(seconds=5), "revision": 3, "labels": {}, "parent_id": "p",
    "result": {"x": 1.0}, "expires_at": START, "last_heartbeat_at": START,
    "first_progress": 40.0, "first_progress_at": START + timedelta(seconds=1),
    "trace_parent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
}  # fmt: skip
UNSENT = {"tenant", "creation_request", "requests"}


def whole(job):
    message = pb.JobStatus()
    convert.job_to_wire(evolve(job, {"projected_completion": projection_of(job)}), message)
    return message


def test_every_field_is_changed_here():
    assert CHANGES.keys() | UNSENT == set(JOB_FIELDS)


@pytest.mark.parametrize("name", CHANGES)
def test_a_job_that_changed_is_rendered_as_it_is_now(name):
    render_job(JOB)
    job = evolve(JOB, {name: CHANGES[name]})
    assert whole(job) != whole(JOB)
    assert pb.JobStatus.FromString(render_job(job)) == whole(job)


def test_what_lasts_is_rendered_once(monkeypatch):
    rendered: list[Job] = []
    lasting_fields = responses._lasting_fields

    def count(job: Job) -> bytes:
        rendered.append(job)
        return lasting_fields(job)

    monkeypatch.setattr(responses, "_lasting_fields", count)
    before = evolve(JOB, {"id": "once"})
    first = evolve(before, {"progress": 60.0, "revision": 3})
    for job in (before, first, before):
        render_job(job)
    assert rendered == [before]
    render_job(evolve(first, {"state": JobState.RETRYING}))
    assert len(rendered) == 2


def test_jobs_of_two_tenants_do_not_share_a_rendering():
    other = evolve(JOB, {"tenant": "t", "reason": "theirs"})
    for job in (JOB, other, JOB, other):
        assert pb.JobStatus.FromString(render_job(job)) == whole(job)


def test_the_renderings_kept_are_bounded(monkeypatch):
    monkeypatch.setattr(responses, "MAX_RENDERED_JOBS", 3)
    for number in range(10):
        job = evolve(JOB, {"id": f"{number}"})
        assert render_job(job) is render_job(job)
        assert len(responses._renderings) <= 3


@pytest.mark.parametrize("is_rendered", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_only_fields_of_reports_make_a_report(name, is_rendered):
    before = evolve(JOB, {"tenant": "t"})
    if is_rendered:
        render_job(before)
    after = evolve(before, {name: CHANGES[name]})
    assert is_report(before, after) == (name in REPORT_FIELDS)
    assert not (is_report(before, after) and is_urgent(before, after))


def test_a_large_rendering_is_not_kept():
    job = evolve(JOB, {"reason": "x" * MAX_KEPT_BYTES})
    assert render_job(job) is not render_job(job)


def test_a_rendering_is_no_part_of_a_job():
    job = evolve(JOB, {})
    render_job(JOB)
    assert job == JOB
    assert repr(job) == repr(JOB)


def test_an_event_is_what_protobuf_makes_of_it():
    event = pb.JobEvent(type=pb.JOB_EVENT_TYPE_UPDATED, job=whole(JOB))
    assert pb.WatchJobResponse.FromString(job_event(2, render_job(JOB))) == pb.WatchJobResponse(event=event)
    synced = pb.JobEvent(type=pb.JOB_EVENT_TYPE_SYNCED)
    assert job_event(4, None) == pb.WatchJobsResponse(events=[synced]).SerializeToString()


JOBS = 500
PAGE = Page([job_in(JobState.PENDING)] * JOBS, [f"{number}.1" for number in range(JOBS)], "")


def test_others_get_their_turns_while_a_large_page_is_rendered():
    async def main() -> int:
        query = to_jobs_query(pb.ListJobsRequest(), Identity("me"))
        rendering = asyncio.create_task(jobs_reply(query, "1", PAGE))
        turns = 0
        while not rendering.done():
            await asyncio.sleep(0)
            turns += 1
        assert len(pb.ListJobsResponse.FromString(rendering.result()).jobs) == JOBS
        return turns

    assert asyncio.run(main()) >= JOBS // JOBS_PER_TURN
