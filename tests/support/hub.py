"""A hub of watchers on a store in memory; events are rendered as words."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter

from jobstatus_grpc.errors import StoreUnavailableError
from jobstatus_grpc.job import Create, JobState, Update
from jobstatus_grpc.stores.memory import MemoryStore
from jobstatus_grpc.watch.filter_watch import FilterHub
from jobstatus_grpc.watch.job_watch import JobHub
from jobstatus_grpc.watch.publisher import Publisher
from jobstatus_grpc.watch.watcher import WakeQueue
from tests.support import loop

TENANT = "default"
UNRENDERABLE = "a reason of which no message can be made"


class FallibleStore(MemoryStore):
    """Raises StoreUnavailableError for the next `failures` reads."""

    failures = 0

    def _try(self):
        if self.failures:
            self.failures -= 1
            raise StoreUnavailableError("the disk is away")

    async def position(self):
        self._try()
        return await super().position()

    async def changes(self, after, *, up_to=None):
        self._try()
        return await super().changes(after, up_to=up_to)


class Hub:
    """A hub that follows a store; an event is rendered as its type and its job's revision."""

    def __init__(self, **settings):
        self.store = FallibleStore()
        self.rendered: Counter[tuple[str, str, int]] = Counter()
        wake_queue = WakeQueue()
        self.hub = JobHub(wake_queue, render=self._render, stamp=lambda: b"", **settings)
        filter_hub = FilterHub(wake_queue, render=lambda event_type, change: b"", stamp=lambda: b"")
        self.publisher = Publisher(self.store, self.hub, filter_hub)

    def _render(self, event_type, job):
        self.rendered[event_type.name, job.id, job.revision] += 1
        if job.reason == UNRENDERABLE:
            raise ValueError(job.reason)
        return f"{event_type.name} {job.revision}".encode()

    @contextlib.asynccontextmanager
    async def followed(self):
        following = asyncio.create_task(self.publisher.follow(await self.store.position()))
        try:
            yield self
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)

    async def create(self, job_id="a"):
        (job,) = (await self.store.commit([Create(id=job_id, state=JobState.IN_PROGRESS)])).outcomes
        return job

    async def update(self, job_id="a", **changes):
        (job,) = (await self.store.commit([Update(id=job_id, changes=changes)])).outcomes
        return job

    @contextlib.asynccontextmanager
    async def watcher(self, job_id="a", *, heartbeat_seconds=30.0, min_update_seconds=0.0, try_send=None, only=None):
        with self.hub.watcher(
            TENANT,
            job_id,
            heartbeat_seconds=heartbeat_seconds,
            min_update_seconds=min_update_seconds,
            try_send=try_send,
            only=only,
        ) as watcher:
            watcher.start(await self.store.get(TENANT, job_id))
            yield watcher

    async def read_all(self, job_id="a", **settings):
        """Watch to the end, and return the messages."""
        async with self.watcher(job_id, **settings) as watcher:
            return [message async for message in until_none(watcher)]


async def until_none(watcher):
    while (message := await watcher.next()) is not None:
        yield message.decode()


def run(scenario, **settings):
    async def with_hub():
        async with Hub(**settings).followed() as hub:
            await hub.create()
            return await scenario(hub)

    return loop.run(with_hub)


async def registered(hub, count):
    while hub.hub.watchers < count:  # noqa: ASYNC110 - the hub has no event to wait for
        await asyncio.sleep(0)
    await turns(5)


async def turns(count):
    for _ in range(count):
        await asyncio.sleep(0)


class Turns:
    """Counts the turns of the running loop, from its creation on."""

    def __init__(self):
        self.count = 0
        self._loop = asyncio.get_running_loop()
        self._next = self._loop.call_soon(self._tick)

    def stop(self):
        self._next.cancel()

    def _tick(self):
        self.count += 1
        self._next = self._loop.call_soon(self._tick)
