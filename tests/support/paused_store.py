"""A store that a test can pause at a read or a commit, to do something in between."""

from __future__ import annotations

import asyncio

from jobstatus_grpc.stores.memory import MemoryStore


class Stop:
    """One read at which the store pauses, before or after it."""

    def __init__(self, kind, number, moment):
        self.kind, self.number, self.moment = kind, number, moment
        self.reached = asyncio.Event()
        self.go_on = asyncio.Event()

    async def pause(self):
        self.reached.set()
        await self.go_on.wait()


class PausedStore(MemoryStore):
    """A store with small pages that pauses where `stop_at` says."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self._stops: list[Stop] = []

    def stop_at(self, kind, number=1, moment="before"):
        """Pause at the `number`th "page", "commit", "replay" of changes, or "feed" read of the hub, from now on."""
        self._stops.append(Stop(kind, number, moment))
        return self._stops[-1]

    async def _read(self, kind, read):
        stops = []
        for stop in self._stops:
            stop.number -= stop.kind == kind
            if stop.kind == kind and stop.number == 0:
                stops.append(stop)
        for stop in stops:
            if stop.moment == "before":
                await stop.pause()
        result = await read
        for stop in stops:
            if stop.moment == "after":
                await stop.pause()
        return result

    async def commit(self, commands):
        return await self._read("commit", super().commit(commands))

    async def page(self, tenant, job_filter, *, limit, cursor=""):
        return await self._read("page", super().page(tenant, job_filter, limit=min(limit, 2), cursor=cursor))

    async def changes(self, after, *, up_to=None):
        kind = "feed" if up_to is None else "replay"
        return await self._read(kind, super().changes(after, up_to=up_to))
