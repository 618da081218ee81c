"""A watch of many jobs after a RESET, and after jobs were removed."""

from __future__ import annotations

import contextlib
from datetime import datetime, timezone

import pytest

from jobstatus_grpc.cli import exits
from jobstatus_grpc.cli.commands import watch
from jobstatus_grpc.cli.commands.watch import Matches
from jobstatus_grpc.client import JobChange, JobChangeType
from jobstatus_grpc.errors import JobExpiredError
from jobstatus_grpc.job import Job, JobState

NOW = datetime.now(timezone.utc)
SYNCED, RESET = JobChange(JobChangeType.SYNCED), JobChange(JobChangeType.RESET)


def updated(job_id: str, state: JobState = JobState.IN_PROGRESS) -> JobChange:
    job = Job(id=job_id, state=state, created_at=NOW, updated_at=NOW)
    return JobChange(JobChangeType.SNAPSHOT, job_id, 1, job)


def gone(job_id: str) -> JobChange:
    return JobChange(JobChangeType.REMOVED, job_id, 2)


def states_until_done(ids, *changes: JobChange) -> list[str]:
    return [job.id for job in watch._until_done(contextlib.nullcontext(changes), ids)]


def test_a_reset_forgets_the_jobs_and_their_number_but_no_outcome():
    matches = Matches()
    changes = [updated("a", JobState.FAILED), updated("b"), SYNCED, RESET, updated("c", JobState.SUCCEEDED)]
    for change in changes:
        matches.take(change)
    assert set(matches.jobs) == {"c"}
    assert exits.of_jobs(matches.outcomes) == exits.FAILED


def test_after_a_reset_all_are_done_only_once_all_are_known_again():
    changes = [SYNCED, updated("a"), RESET, gone("x"), SYNCED, updated("late")]
    assert len(list(Matches().following(changes[1:], until_done=True))) == 4


def test_named_jobs_are_done_when_each_is_though_others_come_again():
    done = JobState.SUCCEEDED
    changes = [
        updated("a", done),
        updated("b"),
        SYNCED,
        gone("a"),
        RESET,
        updated("b"),
        SYNCED,
        updated("b", done),
        updated("late"),
    ]
    assert states_until_done(["a", "b"], *changes) == ["a", "b", "b", "b"]


@pytest.mark.parametrize("changes", [[gone("b")], [RESET, SYNCED], [SYNCED, RESET, updated("a"), SYNCED]])
def test_a_named_job_that_vanishes_before_its_end_is_an_error(changes):
    with pytest.raises(JobExpiredError, match="was deleted or has expired"):
        states_until_done(["a", "b"], updated("a"), updated("b"), *changes)
