"""Which updates are put together, how many fit into a call, and which have no room."""

from __future__ import annotations

import logging

import pytest
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc import JobState
from tests.client.many_jobs import Worker, sent


def test_a_batch_fits_into_a_request():
    worker = Worker()
    for number in range(100):
        worker.give(f"job-{number}", result={"text": "x" * 60_000})
    sizes = []
    while not worker.is_idle:
        sizes.append(pb.BatchUpdateJobsRequest(updates=worker.send()).ByteSize())
    assert max(sizes) <= 4 * 1024 * 1024 < sum(sizes)


def test_reports_on_one_job_become_one_and_the_newest_counts():
    worker = Worker().give("a", progress=1, reason="x").give("b", progress=5).give("a", progress=2).give("a")
    assert sent(worker.send()) == [("a", {"progress": 2, "reason": "x"}), ("b", {"progress": 5})]


@pytest.mark.parametrize(
    "other",
    [
        {"state": JobState.RETRYING},
        {"attempt": 2},
        {"expected_revision": 3},
        {"request_id": "r"},
        {"labels": {}},
        {"allow_missing": True},
    ],
)
def test_what_is_more_than_a_report_stays_as_it_is_and_in_its_place(other):
    worker = Worker().give("a", progress=1).give("a", progress=2, **other).give("a", progress=3)
    updates = worker.send()
    assert [update.job.progress for update in updates] == [1, 2, 3]
    assert len({update.request_id for update in updates}) == 3


@pytest.mark.parametrize(
    "fields", [{"result": {"a": object()}}, {"progress": "half"}, {"reason": "\ud800"}, {"result": {"a": "x" * 2**22}}]
)
def test_an_update_that_cannot_be_sent_is_told_and_spoils_nothing(fields):
    worker = Worker().give("a", progress=1).give("a", **fields)
    assert worker.refused == [("a", "InvalidArgumentError")]
    assert sent(worker.send()) == [("a", {"progress": 1})]


def test_beyond_max_pending_the_oldest_report_makes_room():
    worker = Worker(max_pending=2).give("a", state=JobState.FAILED).give("b", progress=1).give("c", progress=1)
    assert worker.refused == [("b", "ResourceExhaustedError")]
    assert [update.job.id for update in worker.send()] == ["a", "c"]


def test_beyond_max_pending_without_a_report_the_newest_is_left_out():
    worker = Worker(max_pending=1).give("a", state=JobState.FAILED).give("b", state=JobState.FAILED).give("c")
    assert worker.refused == [("b", "ResourceExhaustedError"), ("c", "ResourceExhaustedError")]
    assert [update.job.id for update in worker.send()] == ["a"]


def test_a_dropped_report_is_not_reported_into():
    worker = Worker(max_pending=1).give("a", progress=1).give("b", progress=1).give("a", progress=2)
    assert sent(worker.send()) == [("a", {"progress": 2})]


def test_the_log_says_of_drops_that_there_are_and_how_many_there_were(caplog):
    worker = Worker(tells=False, max_pending=1)
    for number in range(100):
        worker.give(f"job-{number}", progress=1)
    worker.send()
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 2
    assert "99 updates were dropped" in caplog.records[1].getMessage()
