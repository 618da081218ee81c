"""The hub of filter watches: which watchers get a change, pending changes, and what is freed at the end."""

from __future__ import annotations

import asyncio
import gc

import pytest

from jobstatus_grpc.errors import DrainingError, StoreChangedError
from jobstatus_grpc.job import Create, JobFilter, JobState, evolve
from jobstatus_grpc.stores.interface import Change
from jobstatus_grpc.stores.memory import MemoryStore
from jobstatus_grpc.watch.backlog import Backlog, HeldJob, News
from jobstatus_grpc.watch.filter_watch import FilterHub, FilterStream, FilterWatcher
from jobstatus_grpc.watch.watcher import WakeQueue
from tests.support import loop
from tests.support.jobs import job_in

TENANT = "default"
JOB = job_in(JobState.IN_PROGRESS, name="n", parent_id="p", labels={"k": "v", "l": "w"}, stalled=True)
FILTERS = {
    "all": JobFilter(),
    "id": JobFilter(ids=["a", "b"]),
    "parent": JobFilter(parent_id="p"),
    "name": JobFilter(names=["m", "n"]),
    "prefix": JobFilter(name_prefix="n"),
    "labels": JobFilter(labels={"l": "w", "k": "v"}),
    "state": JobFilter(states=[JobState.PENDING, JobState.IN_PROGRESS]),
    "open": JobFilter(done=False),
    "stalled": JobFilter(stalled=True),
}


def run(scenario):
    async def with_hub():
        rendered.clear()
        return await scenario(FilterHub(WakeQueue(), render=render, stamp=lambda: b""))

    return loop.run(with_hub)


rendered: list[tuple[str, int]] = []


def render(event_type, change):
    if change is None:
        return event_type.name.encode()
    rendered.append((event_type.name, change.revision))
    with_job = " whole" if event_type.name == "REMOVED" and change.job is not None else ""
    return f"{event_type.name} {change.id} {change.revision}{with_job}".encode()


def no_limit(held_bytes):
    pass


def watching(hub, job_filter=FILTERS["all"], *, tenant=TENANT, min_update_seconds=0.0, only=None):
    return hub.watcher(tenant, job_filter, heartbeat_seconds=30, min_update_seconds=min_update_seconds, only=only)


def subscribed(hub, watcher):
    hub.buffer(watcher)
    hub.subscribe(watcher)
    return watcher


def change_of(revision=6, **fields):
    job = evolve(JOB, {"revision": revision, **fields})
    return Change(TENANT, job.id, revision, job)


async def publish(hub, *changes, before="0", after="1"):
    await hub.publish(changes, before=before, after=after)


def sent(watcher, now=None):
    now = asyncio.get_running_loop().time() if now is None else now
    return [event.decode() for event in watcher.backlog.take(now, render)]


@pytest.mark.parametrize("name", FILTERS)
def test_a_watcher_gets_a_job_that_matches_and_no_other_job_looks_at_it(name):
    async def scenario(hub):
        with watching(hub, FILTERS[name]) as watcher:
            subscribed(hub, watcher)
            await publish(hub, change_of())
            assert sent(watcher) == ["UPDATED a 6"]
            other = {"id": "c", "name": "x", "parent_id": "", "labels": {}, "stalled": False}
            other_job = evolve(job_in(JobState.FAILED), other)
            is_wide = name in ("all", "prefix")
            assert (watcher in hub._concerned(Change(TENANT, "c", 5, other_job))) == is_wide
            assert watcher not in hub._concerned(Change("another", "a", 6, JOB))

    run(scenario)


def test_a_change_that_is_held_back_is_sent_although_the_timer_was_for_one_that_was_sent_before():
    async def scenario(hub):
        with watching(hub, min_update_seconds=0.05) as watcher:
            subscribed(hub, watcher)
            other = {"id": "b"}
            await publish(hub, change_of(6))
            events = [*(await watcher.next())[0]]
            await asyncio.sleep(0.02)
            await publish(hub, change_of(6, **other))
            events += (await watcher.next())[0]
            await publish(hub, change_of(7), change_of(7, **other))
            sending = asyncio.ensure_future(watcher.next())
            await asyncio.sleep(0)
            await publish(hub, Change(TENANT, "a", 8, None))
            events += (await sending)[0]
            events += (await asyncio.wait_for(watcher.next(), 5))[0]
            assert events == [b"UPDATED a 6", b"UPDATED b 6", b"REMOVED a 8", b"UPDATED b 7"]

    run(scenario)


def test_numbers_of_children_replace_no_change_of_the_job_while_a_watcher_buffers():
    async def scenario(hub):
        with watching(hub, FILTERS["state"]) as watcher:
            hub.buffer(watcher)
            watcher.backlog.hold(JOB)
            left = change_of(state=JobState.RETRYING)
            await publish(hub, left)
            await hub.publish((), before="1", after="2", parents=[left])
            hub.subscribe(watcher)
            assert sent(watcher) == ["REMOVED a 6 whole"]

    run(scenario)


@pytest.mark.parametrize("name", FILTERS)
def test_what_a_reader_holds_is_found_whatever_it_is_like_now_and_released_once_it_is_gone(name):
    async def scenario(hub):
        with watching(hub, FILTERS[name]) as watcher:
            subscribed(hub, watcher)
            watcher.backlog.hold(JOB)
            await publish(hub, Change(TENANT, "a", 6, None))
            assert sent(watcher) == ["REMOVED a 6"]
            assert hub.held == {}

    run(scenario)


ENDS = {
    "a filter that the end matches": (JobFilter(labels={"k": "v"}), ["UPDATED a 7", "REMOVED a 8"]),
    "ends only": (JobFilter(done=True), ["UPDATED a 7", "REMOVED a 8"]),
    "open jobs only": (JobFilter(done=False), ["REMOVED a 7 whole"]),
    "another job": (JobFilter(ids=["b"]), []),
}


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("is_held", [True, False])
def test_the_end_is_sent_of_a_job_that_is_removed_before_it_was_published(name, is_held):
    job_filter, expected = ENDS[name]
    ended = evolve(job_in(JobState.SUCCEEDED, labels={"k": "v"}), {"revision": 7})

    async def scenario(hub):
        with watching(hub, job_filter) as watcher:
            subscribed(hub, watcher)
            if is_held and job_filter.matches(JOB):
                watcher.backlog.hold(JOB)
            await publish(hub, Change(TENANT, "a", 8, None, ended))
            assert sent(watcher) == (expected if is_held or job_filter.matches(ended) else [])
            assert hub.held == {}

    run(scenario)


CORE = JobFilter(labels={"k": "v"})
LEAVES = {
    "leaves": (change_of(6, labels={}, result={"secret": 1}), ["REMOVED a 6"]),
    "leaves and ends": (change_of(6, labels={}, state=JobState.FAILED), ["REMOVED a 6"]),
    "leaves and is removed": (
        Change(TENANT, "a", 8, None, evolve(JOB, {"labels": {}, "revision": 7})),
        ["REMOVED a 8"],
    ),
    "is removed": (Change(TENANT, "a", 8, None, evolve(JOB, {"revision": 7})), ["UPDATED a 7", "REMOVED a 8"]),
    "is removed, and its end is not known": (Change(TENANT, "a", 8, None), ["REMOVED a 8"]),
    "ends": (change_of(6, state=JobState.FAILED), ["REMOVED a 6 whole"]),
}


@pytest.mark.parametrize("name", LEAVES)
def test_a_caller_that_may_not_see_a_job_any_more_gets_its_id_and_no_more(name):
    change, expected = LEAVES[name]

    async def scenario(hub):
        wanted = CORE & JobFilter(done=False) if name == "ends" else CORE
        with watching(hub, wanted, only=CORE) as watcher:
            subscribed(hub, watcher).backlog.hold(JOB)
            await publish(hub, change)
            assert sent(watcher) == expected
            assert hub.held == {}

    run(scenario)


def test_a_job_that_comes_back_before_its_removal_was_sent_is_updated():
    async def scenario(hub):
        with watching(hub, CORE, only=CORE) as watcher:
            subscribed(hub, watcher).backlog.hold(JOB)
            await publish(hub, change_of(6, labels={}))
            await publish(hub, change_of(7))
            assert sent(watcher) == ["UPDATED a 7"]

    run(scenario)


@pytest.mark.parametrize("changed", [{}, {"labels": {}}], ids=["seen", "never seen"])
def test_a_limited_caller_does_not_resume_since_removals_would_name_jobs_that_it_never_saw(changed):
    async def scenario(hub):
        store, messages = MemoryStore(), []
        position = await store.position()
        await store.commit([Create(id="a", **{"labels": {"k": "v"}, **changed})])
        hub.begin(await store.position())

        async def send(message, position):
            messages.append(message.decode())
            if "SYNCED" in messages:
                watcher.end(DrainingError)

        with watching(hub, CORE, only=CORE) as watcher, pytest.raises(DrainingError):
            await FilterStream(store, hub, watcher, send, hold=no_limit).run(position)
        return messages

    assert run(scenario) == ["RESET", *(["SNAPSHOT a 1"] if not changed else []), "SYNCED"]


def test_an_end_that_was_sent_is_not_sent_again_with_the_removal():
    ended = job_in(JobState.SUCCEEDED)

    async def scenario(hub):
        with watching(hub) as watcher:
            subscribed(hub, watcher).backlog.hold(ended)
            await publish(hub, Change(TENANT, "a", 6, None, ended))
            assert sent(watcher) == ["REMOVED a 6"]

    run(scenario)


def test_a_message_with_ends_and_removals_has_at_most_256_events():
    async def scenario(hub):
        with watching(hub) as watcher:
            subscribed(hub, watcher)
            ends = [evolve(job_in(JobState.SUCCEEDED), {"id": f"{number}"}) for number in range(256)]
            await publish(hub, change_of(), *(Change(TENANT, job.id, 6, None, job) for job in ends))
            assert [len(sent(watcher)) for _ in range(4)] == [255, 256, 2, 0]

    run(scenario)


def test_a_change_looks_at_the_watchers_concerned_only():
    async def scenario(hub):
        watchers = [hub.watcher(TENANT, JobFilter(labels={"n": str(number)}), heartbeat_seconds=30,
                                min_update_seconds=0) for number in range(1000)]  # fmt: skip
        for watcher in watchers:
            subscribed(hub, watcher.__enter__())
        assert len(hub._concerned(change_of(labels={"n": "7"}))) == 1
        for watcher in watchers:
            watcher.__exit__(None, None, None)
        assert (hub.watchers, hub._by_key, hub.held) == (0, {}, {})

    run(scenario)


def test_an_event_is_rendered_once_for_all_watchers():
    async def scenario(hub):
        with watching(hub) as first, watching(hub) as second, watching(hub) as third:
            for watcher in (first, second, third):
                subscribed(hub, watcher)
            await publish(hub, change_of())
            assert sent(first) == sent(second) == sent(third) == ["UPDATED a 6"]
            assert rendered == [("UPDATED", 6)]

    run(scenario)


def test_only_the_newest_change_of_a_job_waits_and_of_one_that_matched_for_a_moment_none():
    async def scenario(hub):
        with watching(hub, JobFilter(labels={"k": "v"})) as watcher:
            subscribed(hub, watcher)
            for revision in range(6, 100):
                await publish(hub, change_of(revision, reason=str(revision)))
            await publish(hub, Change(TENANT, "b", 6, evolve(JOB, {"id": "b"})))
            await publish(hub, Change(TENANT, "b", 7, evolve(JOB, {"id": "b", "labels": {"k": "x"}})))
            assert sent(watcher) == ["UPDATED a 99"]

    run(scenario)


def test_minor_changes_are_held_back_for_the_interval_of_their_job_and_the_position_with_them():
    async def scenario(hub):
        with watching(hub, min_update_seconds=10) as watcher:
            backlog = subscribed(hub, watcher).backlog
            backlog.hold(JOB)
            assert backlog.add(News(change_of(6, reason="x"), "0"), 100.0) == 100.0
            assert sent(watcher, 100.0) == ["UPDATED a 6"]
            assert backlog.add(News(change_of(7, reason="y"), "1"), 101.0) == 110.0
            assert backlog.add(News(change_of(8, reason="z"), "2"), 102.0) == 110.0
            assert (sent(watcher, 109.0), backlog.before, backlog.next_due_at) == ([], "2", 110.0)
            assert sent(watcher, 110.0) == ["UPDATED a 8"]
            assert backlog.before is None

    run(scenario)


@pytest.mark.parametrize("fields", [{"labels": {}}, {"cancel_requested": True}, {"attempt": 2}])
def test_what_is_urgent_takes_what_is_held_back_with_it_also_where_a_minor_change_follows(fields):
    async def scenario(hub):
        with watching(hub, min_update_seconds=10) as watcher:
            backlog = subscribed(hub, watcher).backlog
            backlog.hold(JOB)
            backlog.add(News(change_of(6, reason="x"), "0"), 100.0)
            sent(watcher, 100.0)
            backlog.add(News(change_of(7, reason="y"), "1"), 101.0)
            backlog.add(News(change_of(8, reason="y", **fields), "2"), 101.0)
            backlog.add(News(change_of(9, reason="z", **fields), "3"), 101.0)
            assert sent(watcher, 101.0) == ["UPDATED a 9"]
            backlog.add(News(change_of(10, reason="zz", **fields), "4"), 102.0)
            assert sent(watcher, 102.0) == []

    run(scenario)


def test_an_urgent_change_is_known_as_such_by_a_watcher_that_missed_it_between_two_minor_ones():
    async def scenario(hub):
        with watching(hub, min_update_seconds=10) as one, watching(hub, min_update_seconds=10) as other:
            for watcher in (one, other):
                subscribed(hub, watcher).backlog.hold(JOB)
                watcher.backlog.add(News(change_of(6, reason="w"), "0"), 100.0)
            assert sent(other, 100.0) == ["UPDATED a 6"]
            one.backlog.add(News(change_of(7, labels={}), "0"), 100.0)
            assert other.backlog.add(News(change_of(8, labels={}, reason="x"), "1"), 101.0) == 101.0

    run(scenario)


def test_a_job_that_never_rests_does_not_hold_up_the_others_nor_stand_behind_them():
    async def scenario(hub):
        with watching(hub) as watcher:
            backlog = subscribed(hub, watcher).backlog
            backlog.add(News(change_of(6), "0"), 0.0)
            for number in range(300):
                job = evolve(JOB, {"id": f"b{number}"})
                backlog.add(News(Change(TENANT, job.id, 5, job), "1"), 0.0)
                backlog.add(News(change_of(7 + number), "2"), 0.0)
            assert backlog.before == "1"
            assert sent(watcher)[0] == "UPDATED a 306"

    run(scenario)


def test_a_change_sent_early_leaves_nothing_in_the_queue_of_held_changes():
    async def scenario(hub):
        with watching(hub, min_update_seconds=86400) as watcher:
            backlog = subscribed(hub, watcher).backlog
            backlog.hold(JOB)
            for revision in range(6, 6000, 2):
                now = float(revision)
                backlog.add(News(change_of(revision, labels={"n": str(revision)}), "0"), now)
                assert sent(watcher, now)
                backlog.add(News(change_of(revision + 1, labels={"n": str(revision)}, reason="x"), "0"), now)
            assert len(backlog._queue) < 1000

    run(scenario)


def test_thirty_thousand_waiting_changes_are_sent_in_time_that_grows_with_their_number():
    async def scenario(hub):
        with watching(hub, min_update_seconds=1) as watcher:
            backlog = subscribed(hub, watcher).backlog
            for number in range(30_000):
                job = evolve(JOB, {"id": f"b{number}"})
                backlog.add(News(Change(TENANT, job.id, 5, job), "1"), 0.0)
            count = 0
            while events := sent(watcher, 0.0):
                count += len(events)
            assert count == 30_000

    run(scenario)


def test_nothing_is_sent_of_a_job_that_stops_matching_just_before_it_would_be():
    async def scenario(hub):
        messages = []

        async def send(message, position):
            messages.append(message)

        with watching(hub, JobFilter(labels={"k": "v"})) as watcher:
            stream = FilterStream(MemoryStore(), hub, subscribed(hub, watcher), send, hold=no_limit)
            await publish(hub, change_of(6))
            sending = asyncio.create_task(stream._send_due("1"))
            await asyncio.sleep(0)
            await publish(hub, change_of(7, labels={}))
            await sending
        assert messages == []

    run(scenario)


def test_nothing_is_left_of_watchers_that_have_gone():
    async def scenario(hub):
        for name in FILTERS:
            with watching(hub, FILTERS[name]) as watcher:
                subscribed(hub, watcher).backlog.hold(JOB)
                await publish(hub, change_of())
        del watcher
        await asyncio.sleep(0)
        gc.collect()
        assert not [thing for thing in gc.get_objects() if isinstance(thing, (FilterWatcher, Backlog, News, HeldJob))]
        assert (hub.watchers, hub._by_key, hub.held) == (0, {}, {})

    run(scenario)


def test_a_closing_watcher_does_not_restart_because_the_store_changes_too():
    async def scenario(hub):
        with watching(hub) as watcher:
            hub.close(DrainingError)
            hub.end_all(StoreChangedError)
            with pytest.raises(DrainingError):
                await watcher.next_iteration()
        with pytest.raises(DrainingError), watching(hub):
            pass

    run(scenario)
