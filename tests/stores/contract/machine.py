"""A state machine of Hypothesis: for any calls, MemoryStore and another store give the same results."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from jobstatus_grpc.errors import JobStatusError
from jobstatus_grpc.job import (
    PROGRESS,
    Cancel,
    Command,
    Create,
    Delete,
    Expire,
    JobError,
    JobFilter,
    JobState,
    RequestId,
    Stall,
    Update,
    progress_of_child,
)
from jobstatus_grpc.stores.interface import JobStore
from jobstatus_grpc.stores.memory import MemoryStore
from tests.support.stores import RETENTION, StandingClock, following, jobs_of, settled

TENANTS = ["default", "other"]
IDS = ["a", "b", "c", "d"]
tenants, ids = st.sampled_from(TENANTS), st.sampled_from(IDS)
# No text that reaches a store contains NUL: see limits.py.
texts = st.text(max_size=5).map(lambda text: text.replace("\0", ""))
percents = st.floats(0, 100)
states = st.sampled_from(JobState)
requests = st.none() | st.builds(RequestId, st.sampled_from(["r1", 'r"2\\', "r3", "r4"]), st.sampled_from(["h", "i"]))
names = st.sampled_from(["", "n", "né", "n\U0010ffff", "m"]) | texts
labels = st.dictionaries(st.sampled_from("kl") | texts, st.sampled_from("vw") | texts, max_size=2)
results = st.none() | st.dictionaries(texts, st.recursive(st.none() | st.booleans() | percents | texts, st.lists))
timeouts = st.none() | st.timedeltas(timedelta(seconds=1), timedelta(days=7))
instants = st.none() | st.datetimes(timezones=st.just(StandingClock().now.tzinfo))

onlies = st.sampled_from([*[None] * 4, JobFilter(labels={"k": "v"}), JobFilter(name_prefix="n")])

creations = st.builds(
    Create,
    id=ids,
    tenant=tenants,
    only=onlies,
    state=st.sampled_from([JobState.PENDING, JobState.IN_PROGRESS]),
    name=names,
    reason=texts,
    reports_progress=st.booleans(),
    progress=st.none() | percents,
    estimated_completion=instants,
    heartbeat_timeout=timeouts,
    labels=labels,
    parent_id=st.sampled_from(["", "a"]),
    result=results,
    request=requests,
    actor=texts,
)
changes = st.fixed_dictionaries(
    {},
    optional={
        "state": states,
        "reason": texts,
        "reports_progress": st.booleans(),
        "progress": st.none() | percents,
        "estimated_completion": instants,
        "error": st.none() | st.builds(JobError, st.integers(1, 16), texts, texts),
        "heartbeat_timeout": timeouts,
        "labels": labels,
        "result": results,
    },
)
updates = st.builds(
    Update,
    id=ids,
    tenant=tenants,
    only=onlies,
    changes=changes,
    attempt=st.integers(0, 2),
    expected_revision=st.integers(0, 3),
    request=requests,
    allow_missing=st.booleans(),
    name=names,
    parent_id=st.sampled_from(["", "a"]),  # else Hypothesis makes any text
    labels_if_missing=labels,
    actor=texts,
)
cancels = st.builds(Cancel, id=ids, tenant=tenants, only=onlies, reason=texts, request=requests, actor=texts)
deletions = st.builds(Delete, id=ids, tenant=tenants, only=onlies, expected_revision=st.integers(0, 3))
moves = st.builds(
    lambda job_id, tenant, state: Update(id=job_id, tenant=tenant, changes={"state": state}), ids, tenants, states
)
silences = st.builds(Stall, id=ids, tenant=tenants, fail_after=st.none() | st.just(timedelta()))
expiries = st.builds(Expire, id=ids, tenant=tenants)
moments = st.none() | st.timedeltas(-timedelta(hours=2), timedelta(hours=2)).map(lambda by: StandingClock().now + by)
filters = st.builds(
    JobFilter,
    ids=st.sets(ids),
    states=st.sets(states, max_size=3),
    names=st.sets(names, max_size=3),
    name_prefix=st.sampled_from(["", "", "n", "n\U0010ffff"]) | texts,
    labels=labels,
    parent_id=st.sampled_from(["", "", "a"]),
    created_after=moments,
    created_before=moments,
    done=st.sampled_from([None, True, False]),
    stalled=st.sampled_from([None, True, False]),
)
fields = [field.name for field in dataclasses.fields(JobFilter)]
filters_of_few_fields = st.builds(
    lambda job_filter, kept: JobFilter(**{name: getattr(job_filter, name) for name in kept}),
    filters,
    st.sets(st.sampled_from(fields), max_size=3),
)
commands = st.one_of(creations, updates, moves, cancels, deletions, silences, expiries)


def comparable(outcome: object) -> object:
    """Return the comparable part of an outcome."""
    return (type(outcome), str(outcome), outcome.metadata) if isinstance(outcome, JobStatusError) else outcome


class StorePair(RuleBasedStateMachine):
    """The same commands on both, at the same times. `open` says which store is compared."""

    keeps_heartbeats: bool
    """Whether the other store has its heartbeats still after it was closed."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.clock = StandingClock()
        self.memory = MemoryStore(clock=self.clock, retention=RETENTION, seconds=self.clock.seconds)
        self.other: JobStore = self.await_(self.opened())
        self.positions = [self.await_(store.position()) for store in self.stores()]

    def await_(self, call: Any) -> Any:
        return self.loop.run_until_complete(call)

    def answer(self, call: Any) -> object:
        try:
            return comparable(self.await_(call))
        except JobStatusError as error:
            return comparable(error)

    def stores(self) -> tuple[JobStore, JobStore]:
        return self.memory, self.other

    async def open(self) -> JobStore:
        """Open the store that is compared, with the jobs stored so far."""
        raise NotImplementedError

    async def opened(self) -> JobStore:
        store = await self.open()
        await store.overdue(limit=0)  # starts the stall clocks
        return store

    def teardown(self) -> None:
        self.await_(self.other.close())
        self.loop.close()

    @initialize(batch=st.lists(creations, min_size=6, max_size=10))
    def begin(self, batch: list[Command]) -> None:
        self.commit(batch)

    @rule(batch=st.lists(commands, min_size=1, max_size=6))
    def commit(self, batch: list[Command]) -> None:
        outcomes = [[*map(comparable, self.await_(settled(store.commit(batch))))] for store in self.stores()]
        assert outcomes[1] == outcomes[0]

    @rule(duration=st.sampled_from([timedelta(microseconds=1), timedelta(hours=1), timedelta(hours=24), RETENTION]))
    def wait(self, duration: timedelta) -> None:
        self.clock.advance(seconds=duration.total_seconds())

    @rule()
    def open_again(self) -> None:
        self.await_(self.other.close())
        self.other = self.await_(self.opened())
        self.memory.restart_stall_clocks()
        if not self.keeps_heartbeats:
            for clock in self.memory._stall_clocks._clocks.values():
                clock.heard_at = None

    @rule()
    def follow(self) -> None:
        seen = []
        for number, store in enumerate(self.stores()):
            seen.append(self.await_(following(store, self.positions[number])))
            self.positions[number] = self.await_(store.position())
        assert seen[1] == seen[0]

    @rule(tenant=tenants, job_filter=filters_of_few_fields, limit=st.integers(1, 4), examined=st.integers(1, 5))
    def list_jobs(self, tenant: str, job_filter: JobFilter, limit: int, examined: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("jobstatus_grpc.stores.memory.MAX_EXAMINED_ROWS", examined)
            patch.setattr("jobstatus_grpc.stores.sql.criteria.MAX_EXAMINED_ROWS", examined)
            lists = [self.await_(jobs_of(store, job_filter, limit=limit, tenant=tenant)) for store in self.stores()]
        assert lists[1] == lists[0]

    @invariant()
    def counts_are_equal(self) -> None:
        assert self.other.jobs_by_state() == self.memory.jobs_by_state()

    @invariant()
    def jobs_and_histories_are_equal(self) -> None:
        for tenant in TENANTS:
            for job_id in IDS:
                for read in ("get", "transitions"):
                    answers = [self.answer(getattr(store, read)(tenant, job_id)) for store in self.stores()]
                    assert answers[1] == answers[0]

    @invariant()
    def numbers_of_children_are_those_of_the_jobs(self) -> None:
        keys = [(tenant, job_id) for tenant in TENANTS for job_id in IDS]
        for store in self.stores():
            jobs = self.await_(store.jobs(keys))
            children = self.await_(store.children(keys))
            for key in keys:
                of_key = [job for job in jobs.values() if (job.tenant, job.parent_id) == key]
                counts = Counter(job.state for job in of_key)
                total = sum(progress_of_child(job) for job in of_key)
                assert children.get(key, {}) == {**counts, **({PROGRESS: total} if total else {})}
