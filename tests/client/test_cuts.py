"""Connections that are cut again and again: no change is missed, no update is applied twice."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from jobstatus_grpc import JobChange, JobFilter, JobState, JobStatusClient, JobUpdate
from tests.support.tcp_proxy import TcpProxy

CUTS = 25


@pytest.fixture
def proxy(memory_address) -> Iterator[TcpProxy]:
    with TcpProxy(memory_address) as proxy:
        yield proxy


class Family:
    """Jobs with one parent that are created, moved, ended and deleted, and a consumer of their changes."""

    def __init__(self, client: Any, parent_id: str, chance: random.Random) -> None:
        self._client = client
        self._parent_id = parent_id
        self._chance = chance
        self.open = [self._create() for _ in range(20)]
        self.done: list[str] = []
        self.known: dict[str, int] = {}

    def _create(self) -> str:
        return self._client.create(parent_id=self._parent_id).id

    def change(self) -> None:
        """Change one of them, and then make a change that every watch yields."""
        self._change(self._chance.randrange(8))
        self._client.update(self._chance.choice(self.open), labels={"a": str(self._chance.random())})

    def _change(self, kind: int) -> None:
        if kind == 0 and len(self.open) > 5:
            self.done.append(self.open.pop(self._chance.randrange(len(self.open))))
            self._client.update(self.done[-1], state=JobState.SUCCEEDED)
        elif kind == 1 and self.done:
            self._client.delete(self.done.pop())
        elif kind == 2:
            self.open.append(self._create())
        else:
            self._client.update(self._chance.choice(self.open), labels={"a": str(self._chance.random())})

    def take(self, change: JobChange) -> None:
        """Apply a change that a watch yielded."""
        if change.type.name == "RESET":
            self.known.clear()
        elif change.type.name == "REMOVED":
            del self.known[change.id]
        elif change.job is not None:
            assert change.revision > self.known.get(change.id, 0)
            self.known[change.id] = change.revision


@pytest.mark.parametrize("done", [None, False], ids=["all jobs", "open jobs"])
def test_a_watch_of_many_jobs_that_is_cut_all_the_time_misses_nothing(connect, memory_address, proxy, new_id, done):
    chance = random.Random(7)
    jobs_filter = JobFilter(parent_id=new_id(), done=done)
    with JobStatusClient(memory_address) as writer:
        family = Family(writer, jobs_filter.parent_id, chance)
        watch = connect(proxy.address).watch_jobs(jobs_filter, min_update_interval_seconds=0)
        for cut in range(CUTS):
            for _ in range(chance.randrange(1, 12)):
                family.change()
            if cut % 3 == 0:
                proxy.cut()
            for _ in range(chance.randrange(8)):
                family.change()
            family.take(next(watch))
            proxy.cut()
        truth = {job.id: job.revision for job in writer.list_all(jobs_filter)}
        for change in watch:
            family.take(change)
            if family.known == truth:
                break


def test_a_reporter_whose_line_is_cut_all_the_time_reports_everything_once(connect, memory_address, proxy, background):
    def cut_again_and_again() -> None:
        for _ in range(CUTS):
            proxy.cut()
            threading.Event().wait(0.02)

    refused: list[tuple[JobUpdate, Exception]] = []
    with JobStatusClient(memory_address) as reader:
        jobs = [reader.create().id for _ in range(100)]
        with connect(proxy.address).reporter(
            on_error=lambda *refusal: refused.append(refusal), flush_interval_seconds=0.01
        ) as reporter:
            cutting = background(cut_again_and_again)
            for job_id in jobs:
                reporter.update(job_id, state=JobState.IN_PROGRESS, attempt=1)
                for percent in range(0, 100, 10):
                    reporter.update(job_id, progress=percent, attempt=1)
                reporter.update(job_id, state=JobState.SUCCEEDED, attempt=1)
                reporter.flush()
            cutting.result()
        ended = [reader.get(job_id) for job_id in jobs]
    assert refused == []
    assert {(job.state, job.attempt, job.progress) for job in ended} == {(JobState.SUCCEEDED, 1, 100)}
    assert {job.revision for job in ended} <= {4, 5}
