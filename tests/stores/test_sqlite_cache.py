"""The cache holds what is committed, and nothing older."""

from __future__ import annotations

import dataclasses

from jobstatus_grpc.job import Job, JobState
from jobstatus_grpc.stores.rows import StoredJob, store_job
from jobstatus_grpc.stores.sqlite_cache import JobCache
from tests.stores.support import StandingClock

NOW = StandingClock()()


def stored(job_id: str = "a", revision: int = 1) -> StoredJob:
    job = Job(id=job_id, state=JobState.PENDING, created_at=NOW, updated_at=NOW)
    return store_job(1, dataclasses.replace(job, revision=revision), None)


KEY, OTHER = ("default", "a"), ("default", "b")


def test_a_read_fills_the_cache():
    cache = JobCache(1)
    cache.fill(KEY, cache.expect(KEY), stored())
    assert cache.get(KEY) == stored()


def test_a_read_that_a_commit_overtook_is_not_kept():
    cache = JobCache(1)
    ticket = cache.expect(KEY)
    cache.write({KEY: stored(revision=2)})
    cache.write({OTHER: stored("b")})
    cache.fill(KEY, ticket, stored(revision=1))
    assert cache.get(KEY) is None


def test_a_read_that_a_removal_overtook_is_not_kept():
    cache = JobCache(1)
    ticket = cache.expect(KEY)
    cache.write({}, removed=[KEY])
    cache.fill(KEY, ticket, stored())
    assert cache.get(KEY) is None


def test_a_read_of_nothing_leaves_nothing():
    cache = JobCache(1)
    cache.fill(KEY, cache.expect(KEY), None)
    assert cache.get(KEY) is None
    assert not cache._expected


def test_the_jobs_used_last_stay():
    cache = JobCache(2)
    cache.write({KEY: stored(), OTHER: stored("b")})
    cache.get(KEY)
    cache.write({("default", "c"): stored("c")})
    assert cache.get(KEY) is not None
    assert cache.get(OTHER) is None
