"""The numbers of children that a job shows."""

from __future__ import annotations

from jobstatus_grpc.job import JobState
from jobstatus_grpc.job.children import MILLIONTHS, PROGRESS, with_children
from tests.support.jobs import job_in


def test_numbers_below_0_are_not_shown():
    job = with_children(job_in(JobState.IN_PROGRESS), {JobState.PENDING: -1, JobState.IN_PROGRESS: 1, PROGRESS: -5})
    assert (job.children, job.children_progress) == ({"in_progress": 1}, 0.0)


def test_no_mean_is_shown_where_all_numbers_are_below_0():
    job = with_children(job_in(JobState.IN_PROGRESS), {JobState.PENDING: -1, PROGRESS: 100 * MILLIONTHS})
    assert (job.children, job.children_progress) == ({}, None)
