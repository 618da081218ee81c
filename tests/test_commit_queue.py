"""Group commit: commands that arrive during a transaction are committed together in the next one."""

from __future__ import annotations

import asyncio

import pytest

from jobstatus_grpc.commit_queue import MAX_GROUP_COMMANDS, SLOW_COMMIT_SECONDS, CommitQueue
from jobstatus_grpc.errors import JobNotFoundError, StoreFullError, StoreUnavailableError
from jobstatus_grpc.job import Create, Job, Update
from jobstatus_grpc.stores.memory import MemoryStore


class SlowStore(MemoryStore):
    """Begins a commit when `may_go_on` allows it; records each group, and the number of concurrent commits."""

    def __init__(self, commits_at_once=1):
        super().__init__()
        self.commits_at_once = commits_at_once
        self.groups = []
        self.errors = []
        self.may_go_on = asyncio.Semaphore(0)
        self.running = 0
        self.most_running = 0

    async def commit(self, commands):
        self.groups.append([command.id for command in commands])
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        assert self.running <= self.commits_at_once, "the store never sees more groups at once than it can take"
        try:
            await self.may_go_on.acquire()
            if self.errors:
                raise self.errors.pop(0)
            return await super().commit(commands)
        finally:
            self.running -= 1

    def go_on(self):
        """Let every commit begin from now on."""
        for _ in range(10_000):
            self.may_go_on.release()


def run(scenario, commits_at_once=1):
    async def with_queue():
        store = SlowStore(commits_at_once)
        return await scenario(store, CommitQueue(store))

    return asyncio.run(asyncio.wait_for(with_queue(), 10))


def submit(queue, *ids):
    return asyncio.ensure_future(queue.submit([Create(id=job_id) for job_id in ids]))


async def submitted(queue, *submissions):
    """Submit one after another, and return the tasks once all are queued."""
    tasks = [submit(queue, *ids) for ids in submissions]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return tasks


async def until_running(store, commits):
    while store.running < commits:  # noqa: ASYNC110 - the store has no event to wait for
        await asyncio.sleep(0)


def ids_of(outcomes):
    return [outcome.id for outcome in outcomes]


def test_what_arrives_while_a_commit_runs_is_committed_together_in_its_order():
    async def scenario(store, queue):
        (first,) = await submitted(queue, ["a"])
        later = await submitted(queue, ["b"], ["c", "d"], ["e"])
        assert store.groups == [["a"]]
        store.go_on()
        outcomes = await asyncio.gather(first, *later)
        assert store.groups == [["a"], ["b", "c", "d", "e"]]
        assert [ids_of(each) for each in outcomes] == [["a"], ["b"], ["c", "d"], ["e"]]

    run(scenario)


def test_a_lone_command_does_not_wait():
    async def scenario(store, queue):
        store.go_on()
        for job_id in "abc":
            assert ids_of(await submit(queue, job_id)) == [job_id]
        assert store.groups == [["a"], ["b"], ["c"]]

    run(scenario)


def test_a_refused_command_is_an_outcome_that_stops_no_other():
    async def scenario(store, queue):
        store.go_on()
        commands = [Create(id="a"), Update(id="unknown"), Update(id="a", changes={"reason": "x"})]
        first, second, third = await queue.submit(commands)
        assert isinstance(second, JobNotFoundError)
        assert isinstance(third, Job)
        assert (first.revision, third.revision) == (1, 2)

    run(scenario)


def test_a_group_is_not_larger_than_its_limit_unless_one_submission_is():
    async def scenario(store, queue):
        (first,) = await submitted(queue, ["first"])
        singles = await submitted(queue, *([f"{number}"] for number in range(MAX_GROUP_COMMANDS + 10)))
        (large,) = await submitted(queue, [f"large-{number}" for number in range(MAX_GROUP_COMMANDS + 1)])
        store.go_on()
        await asyncio.gather(first, *singles, large)
        assert [len(group) for group in store.groups] == [1, MAX_GROUP_COMMANDS, 10, MAX_GROUP_COMMANDS + 1]
        assert len(large.result()) == MAX_GROUP_COMMANDS + 1

    run(scenario)


@pytest.mark.parametrize("error", [StoreFullError(), StoreUnavailableError(), ZeroDivisionError("odd")])
def test_an_error_of_the_store_reaches_all_callers_in_its_group_and_no_others(error):
    async def scenario(store, queue):
        (first,) = await submitted(queue, ["a"])
        store.errors = [error]
        later = await submitted(queue, ["b"], ["c"])
        store.go_on()
        ends = await asyncio.gather(first, *later, return_exceptions=True)
        assert [type(end) for end in ends] == [type(error), list, list]
        store.errors = [error]
        ends = await asyncio.gather(*await submitted(queue, ["d"], ["e"]), return_exceptions=True)
        assert type(ends[0]) is type(error)
        assert ids_of(await submit(queue, "f")) == ["f"]

    run(scenario)


def test_all_callers_of_a_group_that_fails_get_the_error():
    async def scenario(store, queue):
        (first,) = await submitted(queue, ["a"])
        later = await submitted(queue, *([f"{number}"] for number in range(50)))
        store.may_go_on.release()
        await first
        store.errors = [StoreFullError()]
        store.go_on()
        ends = await asyncio.gather(*later, return_exceptions=True)
        assert {type(end) for end in ends} == {StoreFullError}

    run(scenario)


def test_a_slow_commit_lets_another_run_beside_it():
    async def scenario(store, queue):
        tasks = await submitted(queue, ["a"])
        tasks += await submitted(queue, ["b"])
        await until_running(store, 2)
        tasks += await submitted(queue, ["c"], ["d"])
        await until_running(store, 3)
        tasks += await submitted(queue, ["e"])
        store.go_on()
        await asyncio.gather(*tasks)
        assert store.groups == [["a"], ["b"], ["c", "d"], ["e"]]
        assert not store.running

    run(scenario, commits_at_once=3)


def test_what_comes_while_all_commits_are_slow_begins_another():
    async def scenario(store, queue):
        (first,) = await submitted(queue, ["a"])
        await asyncio.sleep(2 * SLOW_COMMIT_SECONDS)
        (second,) = await submitted(queue, ["b"])
        assert store.groups == [["a"], ["b"]]
        store.go_on()
        assert [ids_of(await task) for task in (first, second)] == [["a"], ["b"]]

    run(scenario, commits_at_once=2)


def test_quick_commits_run_one_after_the_other_also_after_slow_ones(monkeypatch):
    async def scenario(store, queue):
        slow = await submitted(queue, ["a"])
        while len(store.groups) < 3:
            slow += await submitted(queue, [f"slow-{len(slow)}"])
        store.go_on()
        await asyncio.gather(*slow)
        monkeypatch.setattr("jobstatus_grpc.commit_queue.SLOW_COMMIT_SECONDS", 3600)
        store.most_running = 0
        for turn in range(50):
            await asyncio.gather(*await submitted(queue, *([f"{turn}-{number}"] for number in range(20))))
        assert store.most_running == 1

    run(scenario, commits_at_once=3)


def test_a_cancelled_caller_neither_stops_nor_delays_the_others():
    async def scenario(store, queue):
        (first,) = await submitted(queue, ["a"])
        kept, dropped, last = await submitted(queue, ["b"], ["c"], ["d"])
        first.cancel()
        dropped.cancel()
        store.go_on()
        assert ids_of(await kept) == ["b"]
        assert ids_of(await last) == ["d"]
        assert first.cancelled()
        assert dropped.cancelled()
        assert (await store.get("default", "a")).revision == 1, "a commit that has begun goes on"
        assert store.groups == [["a"], ["b", "d"]], "a pending command is withdrawn"

    run(scenario)


def test_a_commit_that_all_callers_have_left_is_none():
    async def scenario(store, queue):
        (first,) = await submitted(queue, ["a"])
        (dropped,) = await submitted(queue, ["b"])
        dropped.cancel()
        store.go_on()
        await first
        await queue.close()
        assert store.groups == [["a"]]

    run(scenario)


def test_closing_waits_for_all_that_was_submitted():
    async def scenario(store, queue):
        tasks = await submitted(queue, ["a"], ["b"], ["c"])
        closing = asyncio.ensure_future(queue.close())
        await asyncio.sleep(0.01)
        assert not closing.done()
        store.go_on()
        await closing
        assert all(task.done() for task in tasks) or ids_of((await asyncio.gather(*tasks))[-1]) == ["c"]
        assert (await store.get("default", "c")).revision == 1
        await queue.close()

    run(scenario)


def test_closing_an_idle_queue_is_nothing():
    async def scenario(store, queue):
        await queue.close()

    run(scenario)


def test_each_commit_that_goes_through_is_observed_with_its_commands_and_seconds():
    seen = []

    async def scenario():
        store = SlowStore()
        store.go_on()
        queue = CommitQueue(store, observe_commit=lambda commands, seconds: seen.append((commands, seconds)))
        await submit(queue, "a", "b")
        store.errors = [StoreFullError()]
        with pytest.raises(StoreFullError):
            await submit(queue, "c")
        await submit(queue, "d")

    asyncio.run(scenario())
    assert [commands for commands, _ in seen] == [2, 1]
    assert all(0 < seconds < 10 for _, seconds in seen)


def test_a_commit_that_cannot_be_observed_is_a_commit_all_the_same(caplog):
    def refuse(commands, seconds):
        raise KeyError(commands)

    async def scenario():
        store = SlowStore()
        store.go_on()
        (job,) = await CommitQueue(store, observe_commit=refuse).submit([Create(id="a")])
        assert isinstance(job, Job)
        assert job.revision == 1

    asyncio.run(scenario())
    assert "a commit cannot be counted" in caplog.text
