"""The cache holds committed jobs, and no older revisions."""

from __future__ import annotations

import dataclasses

from jobstatus_grpc.job import Job, JobState
from jobstatus_grpc.stores.sql.rows import JobCache, StoredJob
from tests.support.stores import StandingClock

NOW = StandingClock()()


def stored(job_id: str = "a", revision: int = 1) -> StoredJob:
    job = Job(id=job_id, state=JobState.PENDING, created_at=NOW, updated_at=NOW)
    return StoredJob(1, dataclasses.replace(job, revision=revision))


KEY, OTHER = ("default", "a"), ("default", "b")


def test_a_read_fills_the_cache():
    cache = JobCache(2)
    ticket = cache.expect([KEY, OTHER])
    cache.fill(ticket, [KEY, OTHER], {KEY: stored(), OTHER: stored("b")})
    assert cache.get(KEY) == stored()
    assert cache.get(OTHER) == stored("b")


def test_of_a_read_what_a_commit_overtook_is_not_kept():
    cache = JobCache(1)
    ticket = cache.expect([KEY, OTHER])
    cache.write({KEY: stored(revision=2)})
    cache.write({("default", "c"): stored("c")})
    cache.fill(ticket, [KEY, OTHER], {KEY: stored(revision=1), OTHER: stored("b")})
    assert cache.get(KEY) is None
    assert cache.get(OTHER) == stored("b")


def test_of_a_read_what_a_removal_overtook_is_not_kept():
    cache = JobCache(1)
    ticket = cache.expect([KEY])
    cache.write({}, removed=[KEY])
    cache.fill(ticket, [KEY], {KEY: stored()})
    assert cache.get(KEY) is None


def test_of_a_read_what_another_read_overtook_is_not_kept():
    cache = JobCache(1)
    older, newer = cache.expect([KEY]), cache.expect([KEY])
    cache.fill(newer, [KEY], {KEY: stored(revision=2)})
    cache.fill(older, [KEY], {KEY: stored(revision=1)})
    assert cache.get(KEY) == stored(revision=2)


def test_a_read_of_nothing_leaves_nothing():
    cache = JobCache(1)
    cache.fill(cache.expect([KEY]), [KEY], {})
    assert cache.get(KEY) is None
    assert not cache._expected


def test_the_jobs_used_last_stay():
    cache = JobCache(2)
    cache.write({KEY: stored(), OTHER: stored("b")})
    cache.get(KEY)
    cache.write({("default", "c"): stored("c")})
    assert cache.get(KEY) is not None
    assert cache.get(OTHER) is None
