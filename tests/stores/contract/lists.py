"""What every store must do with lists: filters, order, pages, and counts by state."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from jobstatus_grpc import errors
from jobstatus_grpc.job import Cancel, Command, Create, Delete, JobFilter, JobState, Update
from jobstatus_grpc.stores.interface import JobStore, Page
from jobstatus_grpc.stores.paging import MAX_EXAMINED_ROWS
from tests.support.stores import ALL, StandingClock, claim, done, end, ids_of, jobs_of, on_store, pages_of, sweep

S = JobState
START = StandingClock().now
MICROSECOND = timedelta(microseconds=1)

FARM: list[list[Command]] = [
    [Create(id="a", name="render", labels={"team": "media"})],
    [Create(id="b", name="render é", parent_id="a"), claim("b")],
    [Create(id="c", name="back_up%", labels={"team": "media", "zone": "eu"}), end("c")],
    [Create(id="d", state=S.IN_PROGRESS, heartbeat_timeout=timedelta(seconds=1))],
    [Create(id="e", name="Render", labels={"zone": "team"}), claim("e"), end("e", S.RETRYING)],
    [Create(id="f", parent_id="a", labels={"team": "ünïcode ☃"}), end("f", S.FAILED)],
    [Create(id="g", name="render\U0010ffff"), Cancel(id="g")],
    [Create(id="h", name="backlog", parent_id="g", labels={"zone": "eu"}), end("h", S.ABORTED)],
]
"""Each is created a microsecond after the one before; `d` stalls."""

FILTERS: dict[str, tuple[JobFilter, str]] = {
    "nothing": (ALL, "hgfedcba"),
    "ids": (JobFilter(ids={"c", "a", "nobody"}), "ca"),
    "a state": (JobFilter(states={S.PENDING}), "a"),
    "a state that may be stalled": (JobFilter(states={S.IN_PROGRESS}), "db"),
    "states": (JobFilter(states={S.SUCCEEDED, S.FAILED, S.IN_PROGRESS}), "fdcb"),
    "every state": (JobFilter(states=set(S)), "hgfedcba"),
    "a name": (JobFilter(names={"render"}), "a"),
    "names": (JobFilter(names={"render", "backlog", "nobody"}), "ha"),
    "no name": (JobFilter(names={""}), "fd"),
    "no name or one": (JobFilter(names={"", "Render"}), "fed"),
    "a prefix": (JobFilter(name_prefix="render"), "gba"),
    "a prefix of one": (JobFilter(name_prefix="render "), "b"),
    "a prefix that is special elsewhere": (JobFilter(name_prefix="back_"), "c"),
    "a prefix at the end of Unicode": (JobFilter(name_prefix="render\U0010ffff"), "g"),
    "a label": (JobFilter(labels={"team": "media"}), "ca"),
    "a label beyond ASCII": (JobFilter(labels={"team": "ünïcode ☃"}), "f"),
    "labels": (JobFilter(labels={"team": "media", "zone": "eu"}), "c"),
    "a parent": (JobFilter(parent_id="a"), "fb"),
    "created then or later": (JobFilter(created_after=START + 5 * MICROSECOND), "hgf"),
    "created earlier": (JobFilter(created_before=START + 2 * MICROSECOND), "ba"),
    "done": (JobFilter(done=True), "hgfc"),
    "not done": (JobFilter(done=False), "edba"),
    "stalled": (JobFilter(stalled=True), "d"),
    "not stalled": (JobFilter(stalled=False), "hgfecba"),
    "ids and a state": (JobFilter(ids={"c", "a", "h"}, done=True), "hc"),
    "ids and a range": (JobFilter(ids={"c", "a", "h"}, created_before=START + 7 * MICROSECOND), "ca"),
    "a parent and a state": (JobFilter(parent_id="a", states={S.FAILED}), "f"),
    "a label and a name": (JobFilter(labels={"zone": "eu"}, names={"backlog"}), "h"),
    "a label and a prefix": (JobFilter(labels={"zone": "eu"}, name_prefix="back"), "hc"),
    "a prefix and names": (JobFilter(name_prefix="re", names={"render", "backlog"}), "a"),
    "a prefix and a range": (JobFilter(name_prefix="render", created_after=START + MICROSECOND), "gb"),
    "in progress and not stalled": (JobFilter(states={S.IN_PROGRESS}, stalled=False), "b"),
    "a state and done": (JobFilter(states={S.PENDING, S.FAILED}, done=True), "f"),
    "a range": (JobFilter(created_after=START + MICROSECOND, created_before=START + 3 * MICROSECOND), "cb"),
    "all at once": (
        JobFilter(
            ids={"b", "f"},
            states={S.FAILED},
            names={""},
            labels={"team": "ünïcode ☃"},
            parent_id="a",
            created_after=START,
            created_before=START + 6 * MICROSECOND,
            done=True,
            stalled=False,
        ),
        "f",
    ),
    "done and stalled": (JobFilter(done=True, stalled=True), ""),
    "a state that contradicts": (JobFilter(states={S.FAILED}, done=False), ""),
    "an empty range": (JobFilter(created_after=START, created_before=START), ""),
    "a label with another's value": (JobFilter(labels={"team": "eu"}), ""),
    "an unknown label": (JobFilter(labels={"Team": "media"}), ""),
    "an unknown parent": (JobFilter(parent_id="b"), ""),
    "an unknown prefix": (JobFilter(name_prefix="renders"), ""),
}


async def farm(store: JobStore, clock: StandingClock) -> None:
    """Make the jobs of FARM."""
    for commands in FARM:
        await done(store, commands[0])
        now = clock.now
        clock.advance(seconds=1)
        await done(store, *commands[1:], *await store.overdue(limit=1))
        clock.now = now + MICROSECOND


class ListsContract:
    """Lists and counts."""

    async def open(self, directory: Path, clock: StandingClock) -> JobStore:
        """Return a new store, or the one in `directory` again."""
        raise NotImplementedError

    # Filters

    @pytest.mark.parametrize("name", FILTERS)
    @on_store
    async def test_a_filter_leaves_what_matches_the_newest_created_first(self, store, clock, name):
        await farm(store, clock)
        job_filter, ids = FILTERS[name]
        for limit in (1, 2, 1000):
            assert "".join(await ids_of(store, job_filter, limit=limit)) == ids

    @on_store
    async def test_jobs_of_the_same_instant_are_in_the_order_of_their_creation(self, store):
        await done(store, *(Create(id=job_id, name="n") for job_id in "zxy"), Create(id="a", name="n"))
        for job_filter in (ALL, JobFilter(names={"n"}), JobFilter(ids=set("zxya")), JobFilter(name_prefix="n")):
            assert await ids_of(store, job_filter, limit=1) == ["a", "y", "x", "z"]

    @on_store
    async def test_a_list_shows_jobs_as_get_does(self, store, clock):
        await farm(store, clock)
        assert await jobs_of(store) == [await store.get("default", job_id) for job_id in "hgfedcba"]

    @on_store
    async def test_a_tenant_lists_its_own_jobs_only(self, store):
        fields: dict[str, Any] = {"name": "n", "parent_id": "p", "labels": {"k": "v"}}
        await done(store, *(Create(id="a", tenant=tenant, **fields) for tenant in ("one", "two")), Create(id="b"))
        by_index = JobFilter(names={"n"}), JobFilter(parent_id="p"), JobFilter(labels={"k": "v"}), JobFilter(done=False)
        for job_filter in (ALL, JobFilter(ids={"a", "b"}), JobFilter(name_prefix="n"), *by_index):
            assert [job.tenant for job in await jobs_of(store, job_filter, tenant="one")] == ["one"]
            assert await jobs_of(store, job_filter, tenant="three") == []

    @on_store
    async def test_a_job_is_listed_as_what_it_has_become(self, store):
        await done(store, Create(id="a"), Create(id="b"), claim("b"))
        await done(store, claim("a"), end("b"))
        assert await ids_of(store, JobFilter(states={S.PENDING})) == []
        assert await ids_of(store, JobFilter(states={S.IN_PROGRESS})) == ["a"]
        assert await ids_of(store, JobFilter(done=True)) == ["b"]

    @on_store
    async def test_a_job_stalls_and_recovers_in_lists_too(self, store, clock):
        await done(store, Create(id="a", state=S.IN_PROGRESS, heartbeat_timeout=timedelta(seconds=1)))
        clock.advance(seconds=1)
        await sweep(store)
        assert await ids_of(store, JobFilter(stalled=True)) == ["a"]
        await done(store, Update(id="a", changes={"progress": 1.0}))
        assert await ids_of(store, JobFilter(stalled=True)) == []
        assert await ids_of(store, JobFilter(stalled=False)) == ["a"]

    @on_store
    async def test_labels_that_were_replaced_lead_to_the_job_no_more(self, store):
        await done(store, Create(id="a", labels={"kept": "1", "changed": "1", "gone": "1"}))
        await done(store, Update(id="a", changes={"labels": {"kept": "1", "changed": "2"}}))
        for labels, ids in [({"kept": "1", "changed": "2"}, ["a"]), ({"changed": "1"}, []), ({"gone": "1"}, [])]:
            assert await ids_of(store, JobFilter(labels=labels)) == ids
        await done(store, Update(id="a", changes={"labels": {}}), Update(id="a", changes={"labels": {"gone": "1"}}))
        assert await ids_of(store, JobFilter(labels={"kept": "1"})) == []
        assert await ids_of(store, JobFilter(labels={"gone": "1"})) == ["a"]

    @on_store
    async def test_a_job_that_is_gone_is_in_no_list(self, store, clock):
        await farm(store, clock)
        await done(store, *(Delete(id=job_id) for job_id in "hgfc"))
        for job_filter, ids in FILTERS.values():
            assert "".join(await ids_of(store, job_filter)) == "".join(job_id for job_id in ids if job_id not in "hgfc")

    @on_store
    async def test_an_id_that_is_used_again_is_listed_as_the_new_job(self, store, clock):
        await done(store, Create(id="a", labels={"k": "old"}), end("a"), Delete(id="a"))
        clock.advance(hours=24)
        await done(store, Create(id="a", labels={"k": "new"}))
        assert await ids_of(store, JobFilter(labels={"k": "old"})) == []
        assert await ids_of(store, JobFilter(labels={"k": "new"})) == ["a"]

    # Pages

    @on_store
    async def test_pages_are_full_but_for_the_last_and_the_last_says_so(self, store):
        await done(store, *(Create(id=f"{n}") for n in range(7)))
        assert [len(page.jobs) for page in await pages_of(store, limit=3)] == [3, 3, 1]
        assert [len(page.jobs) for page in await pages_of(store, limit=7)] == [7]
        assert await store.page("nobody", ALL, limit=1) == Page([], [], "")

    @on_store
    async def test_each_job_has_the_cursor_of_what_follows_it(self, store, clock):
        await farm(store, clock)
        page = await store.page("default", JobFilter(done=True), limit=1000)
        for number, cursor in enumerate(page.cursors, start=1):
            rest = await store.page("default", JobFilter(done=True), limit=1000, cursor=cursor)
            assert rest.jobs == page.jobs[number:]

    @on_store
    async def test_nothing_comes_twice_or_is_left_out_while_jobs_come_and_go(self, store, clock):
        await done(store, *(Create(id=f"{n}") for n in range(10)))
        seen: list[str] = []
        cursor = ""
        for number in range(5):
            page = await store.page("default", ALL, limit=2, cursor=cursor)
            seen += [job.id for job in page.jobs]
            cursor = page.next_cursor
            await done(store, Create(id=f"new {number}"), end(seen[-1]), Delete(id=seen[-1]))
            clock.advance(seconds=1)
        assert (seen, cursor) == ([f"{n}" for n in range(9, -1, -1)], "")

    @pytest.mark.parametrize("cursor", ["x", ".", "1", "1.", ".1", "1.2.3", "-1.2", "1 .2", "²." + "1" * 30, "1.9e3"])
    @on_store
    async def test_a_cursor_that_is_none_is_refused(self, store, cursor):
        for job_filter in (ALL, JobFilter(ids={"a"}), JobFilter(done=True, stalled=True)):
            with pytest.raises(errors.InvalidTokenError):
                await store.page("default", job_filter, limit=1, cursor=cursor)

    @pytest.mark.timeout(120)
    @on_store
    async def test_short_pages_lead_to_all_that_matches(self, store, clock):
        """More jobs have the parent than one page may examine, and the jobs with the label come after them."""
        count, labelled = MAX_EXAMINED_ROWS + 2000, 1500
        for start in range(0, count, 500):
            labels = {"k": "v"} if start < labelled else {}
            numbers = range(start, start + 500)
            await done(store, *(Create(id=f"{n}", name=f"n{n}", parent_id="p", labels=labels) for n in numbers))
            clock.advance(seconds=1)
        old = [f"{n}" for n in range(labelled - 1, -1, -1)]
        assert await ids_of(store, JobFilter(parent_id="p", labels={"k": "v"}), limit=400) == old
        assert await ids_of(store, JobFilter(name_prefix="n", labels={"k": "v"}, done=False), limit=400) == old
        assert await ids_of(store, JobFilter(name_prefix="n1499"), limit=1) == ["1499"]
        assert len(await ids_of(store, JobFilter(name_prefix="n"), limit=1000)) == count

    @on_store
    async def test_a_closed_store_lists_nothing(self, store):
        await store.close()
        with pytest.raises(errors.StoreUnavailableError):
            await store.page("default", ALL, limit=1)

    # Counts

    @on_store
    async def test_jobs_are_counted_by_state_over_all_tenants(self, store, clock):
        assert store.jobs_by_state() == dict.fromkeys(S, 0)
        await farm(store, clock)
        await done(store, Create(id="a", tenant="other"), Create(id="z", tenant="other"))
        assert store.jobs_by_state() == dict(zip(S, [3, 2, 1, 1, 1, 1, 1], strict=True))

    @on_store
    async def test_the_jobs_of_a_tenant_are_counted_up_to_a_number(self, store, clock):
        await farm(store, clock)
        await done(store, Create(id="a", tenant="other"), Create(id="b", tenant="other"))
        await done(store, Update(id="b", tenant="other", changes={"state": S.SUCCEEDED}))
        counts = [await store.count(tenant, at_most=100) for tenant in ("default", "other", "nobody")]
        assert [*counts, await store.count("default", at_most=3)] == [8, 2, 0, 3]
        await done(store, Delete(id="b", tenant="other"))
        assert await store.count("other", at_most=100) == 1

    @on_store
    async def test_jobs_that_are_gone_and_commands_that_were_refused_do_not_count(self, store):
        await done(store, Create(id="a"), end("a"), Create(id="b"), end("b"), Delete(id="b"))
        await store.commit([Delete(id="a"), Create(id="a"), claim("nobody"), Create(id="c")])
        assert store.jobs_by_state() == {**dict.fromkeys(S, 0), S.PENDING: 1}
