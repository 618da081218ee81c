"""A random load that is meant to break promises: races, repeats, cut watches.

Each write to a job has a reason of its own, by which the checker recognises it in the job.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
import uuid
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeAlias

from google.protobuf import duration_pb2
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.verify.history import Entry
from jobstatus_grpc.verify.recorder import Recorder, Stream

RECENT_JOBS = 50
"""Jobs that readers and watchers choose from: few, so that they meet the writers."""

GROUPS = 8
"""Values of the label `group`: filters by it match some of the jobs."""

STALLED_WATCHES = 2
"""Watches that are not read: they must not delay others."""

STALLING_UPDATES, STALLING_CHARACTERS = 120, 60_000
"""Updates with a large result: they fill the buffers of the watches that are not read, about 4 MiB each."""

REPEAT_SECONDS = 30.0
"""Time for which a write with a request_id is repeated while the server does not answer."""

UNAVAILABLE_SECONDS = 0.05
"""The pause after a call that the server did not answer."""

PLACES = 4
"""The last tokens of a watch, from one of which the next one resumes."""

LOOK_SECONDS = 0.1
"""Between two looks at what a watch has sent."""

FAMILIES = 4
"""Jobs that are the parents of half of the others: few, so that their children change at once."""

WRITES_BEFORE_REPEATS = 40
"""Writes to a job after which some of its first requests are sent again: services that remember few are found."""

_ENDS = (pb.JOB_STATE_SUCCEEDED, pb.JOB_STATE_FAILED, pb.JOB_STATE_ABORTED, pb.JOB_STATE_CANCELLED)


class Workload:
    """Workers, readers and watchers on the servers of a recorder."""

    def __init__(self, recorder: Recorder, *, labels: Mapping[str, str], seed: int, clients: int) -> None:
        """`labels` are set on each job; `clients` is the number of workers, with half as many readers and watchers."""
        self.made: list[str] = []
        """The ids of the jobs."""
        self._recorder = recorder
        self._labels = dict(labels)
        self._seed = seed
        self._clients = clients
        self._numbers = itertools.count(1)
        self._recent: deque[str] = deque(maxlen=RECENT_JOBS)
        self._parents: list[str] = []
        self._run = uuid.uuid4().hex[:8]  # ids of an earlier run with this seed are in use
        self._over = asyncio.Event()
        """Set when the load ends."""

    async def run(self, seconds: float, *, patience_seconds: float) -> None:
        """Load the servers for `seconds`, then wait until watchers must have all changes."""
        end = asyncio.get_running_loop().call_later(seconds, self._over.set)
        try:
            await self._load(patience_seconds)
        finally:
            end.cancel()

    async def _load(self, patience_seconds: float) -> None:
        for number in range(FAMILIES):
            await self._create_parent(f"verify-{self._run}-parent-{number}")
        half = max(1, self._clients // 2)
        kinds: list[Callable[[random.Random], Coroutine[Any, Any, None]]] = [self._work] * self._clients
        kinds += [self._read] * half + [self._watch] * half
        # In the end the followers hold all jobs, each by another filter.
        chances = [self._chance(f"follower {number}") for number in range(half + 2)]
        everything = pb.WatchJobsRequest(filter=pb.JobFilter(labels=self._labels), min_update_interval=_duration(0))
        async with contextlib.AsyncExitStack() as stack:
            for number in range(STALLED_WATCHES):
                server = number % self._recorder.size
                await stack.enter_async_context(self._recorder.stalled("WatchJobs", everything, server=server))
            clients = [asyncio.create_task(self._repeat(kind, number)) for number, kind in enumerate(kinds)]
            clients.append(asyncio.create_task(self._stall()))
            working = asyncio.ensure_future(self._finish_work(clients))
            followers = [asyncio.create_task(self._follow(chance, working, patience_seconds)) for chance in chances]
            try:
                await asyncio.gather(working, *followers)
            finally:
                for task in (*clients, *followers):
                    task.cancel()
                await asyncio.gather(*clients, *followers, return_exceptions=True)

    async def _create_parent(self, job_id: str) -> None:
        job = pb.JobStatus(id=job_id, name="verify", labels={**self._labels, "group": "0"})
        self.made.append(job_id)
        until = time.monotonic() + REPEAT_SECONDS
        request = pb.CreateJobRequest(job=job, request_id=job_id)
        entry = await self._recorder.call("CreateJob", request)
        while entry.response is None and not entry.is_refused and time.monotonic() < until:
            await asyncio.sleep(UNAVAILABLE_SECONDS)
            entry = await self._recorder.call("CreateJob", request)
        self._parents.append(job_id)

    async def _finish_work(self, clients: Sequence[asyncio.Task[None]]) -> None:
        """Wait for the clients, then read the parents and their children, from which the checker counts these."""
        await asyncio.gather(*clients)
        for server, parent_id in enumerate(self._parents):
            request = pb.ListJobsRequest(filter=pb.JobFilter(parent_id=parent_id), page_size=1000)
            while True:
                entry = await self._recorder.call("ListJobs", request, server=server % self._recorder.size)
                if entry.response is None or not entry.response.next_page_token:
                    break
                request.page_token = entry.response.next_page_token
            await self._recorder.call("GetJob", pb.GetJobRequest(id=parent_id), server=server % self._recorder.size)

    def stop(self) -> None:
        """End the load before its time; watchers still get the time to receive all changes."""
        self._over.set()

    async def _stall(self) -> None:
        job = pb.JobStatus(id=f"verify-{self._run}-long", labels=self._labels, state=pb.JOB_STATE_IN_PROGRESS)
        self.made.append(job.id)
        await self._recorder.call("CreateJob", pb.CreateJobRequest(job=job))
        for number in range(STALLING_UPDATES):
            update = pb.UpdateJobRequest(job=pb.JobStatus(id=job.id))
            update.job.result["padding"] = f"{number:<{STALLING_CHARACTERS}}"
            await self._recorder.call("UpdateJob", update)

    def _chance(self, name: str) -> random.Random:
        return random.Random(f"{self._seed} {name}")

    async def _repeat(self, kind: Callable[[random.Random], Coroutine[Any, Any, None]], number: int) -> None:
        chance = self._chance(f"client {number}")
        while not self._over.is_set():
            await kind(chance)

    def _server(self, chance: random.Random) -> int:
        return chance.randrange(self._recorder.size)

    async def _work(self, chance: random.Random) -> None:
        """Run a job from its creation to its end, and sometimes delete it."""
        job_id = f"verify-{self._run}-{next(self._numbers)}"
        labels = {**self._labels, "group": str(chance.randrange(GROUPS))}
        parent_id = chance.choice(self._parents) if chance.random() < 0.5 else ""
        life = _Life(self._recorder, chance, job_id, labels, parent_id=parent_id)
        self._recent.append(job_id)
        is_created = await life.create()
        self.made.append(job_id)  # also without an answer: it may exist
        if not is_created:
            return
        rivals = 2 if chance.random() < 0.3 else 1
        await asyncio.gather(*(life.claim() for _ in range(rivals)))
        for _ in range(chance.randrange(6)):
            if self._over.is_set():
                break
            await life.report()
        if chance.random() < 0.1:
            await life.repeat_old_requests()
        await life.end()
        if chance.random() < 0.3:
            await life.delete()

    async def _read(self, chance: random.Random) -> None:
        """Read a job, its history, a list, or a job that does not exist."""
        server = self._server(chance)
        job_id = chance.choice([*self._recent, *self._parents])
        match chance.randrange(8):
            case 0:
                request = pb.GetJobRequest(id=f"never-{chance.getrandbits(64)}")
                entry = await self._recorder.call("GetJob", request, server=server)
            case 1:
                history = pb.ListJobTransitionsRequest(id=job_id, page_size=1000)
                entry = await self._recorder.call("ListJobTransitions", history, server=server)
            case 2:
                entry, _ = await self._list(self._filter(chance), chance)
            case _:
                entry = await self._recorder.call("GetJob", pb.GetJobRequest(id=job_id), server=server)
        await asyncio.sleep(0.001 if entry.code != "UNAVAILABLE" else UNAVAILABLE_SECONDS)

    async def _list(self, wanted: pb.JobFilter, chance: random.Random, *, page_size: int = 0) -> tuple[Entry, _Jobs]:
        """Read a list page by page, each from another server; return the last page, or the one that failed, and all
        jobs. The size of a page is random unless it is given."""
        request = pb.ListJobsRequest(filter=wanted, page_size=page_size or chance.choice([3, 20, 1000]))
        jobs: dict[str, Any] = {}
        while True:
            entry = await self._recorder.call("ListJobs", request, server=self._server(chance))
            if entry.response is not None:
                jobs |= {job.id: _version_of(job) for job in entry.response.jobs}
            if entry.response is None or not entry.response.next_page_token:
                return entry, jobs
            request.page_token = entry.response.next_page_token

    def _filter(self, chance: random.Random) -> pb.JobFilter:
        wanted = pb.JobFilter(labels=self._labels)
        kind = chance.randrange(4)
        if kind == 1:
            wanted.labels["group"] = str(chance.randrange(GROUPS))
        elif kind == 2:
            wanted.states.extend([pb.JOB_STATE_IN_PROGRESS, pb.JOB_STATE_RETRYING])
        elif kind == 3:
            wanted.done = False
        return wanted

    async def _watch(self, chance: random.Random) -> None:
        """Watch a job to its end, or leave before."""
        request = pb.WatchJobRequest(
            id=chance.choice([*self._recent, *self._parents]), min_update_interval=_duration(chance.choice([0, 0.1]))
        )
        seconds = chance.choice([0.0, 0.02, 0.3, 2.0, 10.0])
        async with self._recorder.watch("WatchJob", request, server=self._server(chance)) as stream:
            await _any_of(stream.ended, self._over, seconds=seconds)
        if stream.entry.code == "UNAVAILABLE":
            await asyncio.sleep(UNAVAILABLE_SECONDS)

    async def _follow(self, chance: random.Random, working: asyncio.Future[Any], patience_seconds: float) -> None:
        """Follow all jobs of a filter, with cuts after which the watch resumes from one of the last tokens.

        The last watch is open until it has sent what a list has, or the checker can demand each change from it:
        `patience_seconds` after the last call.
        """
        wanted = self._filter(chance)
        places: deque[tuple[str, _Jobs]] = deque([("", {})], maxlen=PLACES)
        """The last tokens, and the jobs that a client with each of them has."""
        while True:
            is_last = self._over.is_set()
            token, known = chance.choice(places)
            if chance.random() < 0.2:
                entry, listed = await self._list(wanted, chance)
                if entry.response is not None and entry.response.resume_token:
                    token, known = entry.response.resume_token, listed
            view = _View(known)
            request = pb.WatchJobsRequest(
                filter=wanted, resume_token=token, min_update_interval=_duration(chance.choice([0, 0.1]))
            )
            async with self._recorder.watch("WatchJobs", request, server=self._server(chance)) as stream:
                if is_last:
                    await asyncio.wait([working])
                    await self._until_in_step(stream, view, wanted, chance, seconds=1.2 * patience_seconds)
                    return
                await _any_of(stream.ended, self._over, seconds=chance.uniform(0, 3))
            responses = stream.entry.responses
            for number, (_, message) in enumerate(responses, start=1):
                view.take(message)
                # Until SYNCED a message has the token of the request, with which a client need not have its events.
                if message.resume_token not in ("", token) and len(responses) - number < PLACES:
                    places.append((message.resume_token, dict(view.jobs)))
            if stream.entry.code:
                await asyncio.sleep(UNAVAILABLE_SECONDS)

    async def _until_in_step(
        self, stream: Stream, view: _View, wanted: pb.JobFilter, chance: random.Random, *, seconds: float
    ) -> None:
        """Wait until a stream of WatchJobs has sent SYNCED and what a list has, or ends; at most `seconds` and the time
        that the list takes."""
        entry, listed = await self._list(wanted, chance, page_size=1000)
        ends_at = time.monotonic() + seconds
        taken = 0
        while (left_seconds := ends_at - time.monotonic()) > 0:
            for _, message in stream.entry.responses[taken:]:
                view.take(message)
                taken += 1
            is_in_step = entry.response is not None and view.is_synced and view.jobs == listed
            if is_in_step or await _any_of(stream.ended, seconds=min(left_seconds, LOOK_SECONDS)):
                return


_Jobs: TypeAlias = Mapping[str, Any]
"""The version of each job, by its id."""


def _version_of(job: pb.JobStatus) -> Any:
    return job.revision, dict(job.children.items()), job.children_progress


class _View:
    """What a client of WatchJobs has after the messages that it took."""

    def __init__(self, jobs: _Jobs) -> None:
        self.jobs = dict(jobs)
        self.is_synced = False

    def take(self, message: pb.WatchJobsResponse) -> None:
        for event in message.events:
            match event.type:
                case pb.JOB_EVENT_TYPE_RESET:
                    self.jobs.clear()
                    self.is_synced = False
                case pb.JOB_EVENT_TYPE_SYNCED:
                    self.is_synced = True
                case pb.JOB_EVENT_TYPE_REMOVED:
                    self.jobs.pop(event.job.id, None)
                case _ if event.HasField("job"):
                    self.jobs[event.job.id] = _version_of(event.job)


class _Life:
    """One job, and the writes to it."""

    def __init__(
        self, recorder: Recorder, chance: random.Random, job_id: str, labels: Mapping[str, str], *, parent_id: str
    ) -> None:
        self.job_id = job_id
        self._parent_id = parent_id
        self._recorder = recorder
        self._chance = chance
        self._labels = labels
        self._attempt = 0
        self._progress = 0.0
        self._writes = 0
        self._revision = 0
        self._accepted: list[tuple[str, Any]] = []
        """The method and the request of each write with a request_id that was accepted."""

    async def create(self) -> bool:
        """Create the job; return whether it exists."""
        job = pb.JobStatus(
            id=self.job_id, name="verify", labels=self._labels, reason=self._reason(), parent_id=self._parent_id
        )
        if self._chance.random() < 0.2:
            update = pb.UpdateJobRequest(job=job, allow_missing=True)
            return await self._send("UpdateJob", update) is not None
        return await self._send("CreateJob", pb.CreateJobRequest(job=job)) is not None

    async def claim(self) -> None:
        """Claim the next attempt; another worker may be first."""
        attempt = self._attempt + 1
        job = pb.JobStatus(id=self.job_id, state=pb.JOB_STATE_IN_PROGRESS, reason=self._reason())
        if await self._send("UpdateJob", pb.UpdateJobRequest(job=job, attempt=attempt)) is not None:
            self._attempt = attempt

    async def report(self) -> None:
        """Report progress in one of several ways."""
        match self._chance.randrange(9):
            case 0:
                heartbeat = pb.UpdateJobRequest(job=pb.JobStatus(id=self.job_id), attempt=self._attempt)
                heartbeat.update_mask.SetInParent()
                await self._send("UpdateJob", heartbeat)
            case 1:
                stale = pb.UpdateJobRequest(job=self._job(), attempt=max(1, self._attempt - 1))
                await self._send("UpdateJob", stale)
            case 2:
                # Two writers expect one revision.
                updates = [pb.UpdateJobRequest(job=self._job(), expected_revision=self._revision) for _ in range(2)]
                await asyncio.gather(*(self._send("UpdateJob", update) for update in updates))
            case 3:
                updates = [pb.UpdateJobRequest(job=self._job(), attempt=self._attempt) for _ in range(3)]
                for number, update in enumerate(updates):
                    update.request_id = f"{self.job_id}-batch-{self._writes}-{number}"
                await self._send("BatchUpdateJobs", pb.BatchUpdateJobsRequest(updates=updates))
            case 4:
                retry = pb.JobStatus(id=self.job_id, state=pb.JOB_STATE_RETRYING, reason=self._reason())
                await self._send("UpdateJob", pb.UpdateJobRequest(job=retry, attempt=self._attempt))
                await self.claim()
            case 5:
                # It leaves the filters by one group, and enters those by another.
                moved = pb.UpdateJobRequest(job=self._job(), attempt=self._attempt)
                moved.job.labels.update({**self._labels, "group": str(self._chance.randrange(GROUPS))})
                await self._send("UpdateJob", moved)
            case _:
                await self._send("UpdateJob", pb.UpdateJobRequest(job=self._job(), attempt=self._attempt))

    async def repeat_old_requests(self) -> None:
        """Send requests again that many others have followed."""
        for _ in range(WRITES_BEFORE_REPEATS):
            await self._send("UpdateJob", pb.UpdateJobRequest(job=self._job(), attempt=self._attempt))
        for method, request in self._chance.sample(self._accepted[:10], min(3, len(self._accepted))):
            await self._recorder.call(method, request, server=self._server())

    async def end(self) -> None:
        """Try to end the job, by a final state or a cancel, then to change it."""
        if self._chance.random() < 0.1:
            await self._send("CancelJob", pb.CancelJobRequest(id=self.job_id, reason="no longer needed"))
        job = pb.JobStatus(id=self.job_id, state=self._chance.choice(_ENDS), reason=self._reason())
        if job.state == pb.JOB_STATE_FAILED:
            job.error.message = "broken"
        await self._send("UpdateJob", pb.UpdateJobRequest(job=job, attempt=self._attempt))
        if self._chance.random() < 0.3:
            await self._send("UpdateJob", pb.UpdateJobRequest(job=self._job()))

    async def delete(self) -> None:
        """Delete the job, and read it."""
        request = pb.DeleteJobRequest(id=self.job_id)
        await self._recorder.call("DeleteJob", request, server=self._server())
        await self._recorder.call("GetJob", pb.GetJobRequest(id=self.job_id), server=self._server())

    def _job(self) -> pb.JobStatus:
        self._progress = min(99.0, self._progress + self._chance.uniform(-5, 20))
        return pb.JobStatus(id=self.job_id, progress=max(0.0, self._progress), reason=self._reason())

    def _reason(self) -> str:
        self._writes += 1
        return f"write {self._writes}"

    def _server(self) -> int:
        return self._chance.randrange(self._recorder.size)

    async def _send(self, method: str, request: Any) -> Any:
        """Send a write, most with a request_id, until it is answered; some again after that. Return the job or None."""
        is_repeatable = self._chance.random() < 0.8
        if is_repeatable and method != "BatchUpdateJobs":
            request.request_id = f"{self.job_id}-{self._writes}-{self._chance.getrandbits(32)}"
        until = time.monotonic() + REPEAT_SECONDS
        entry = await self._recorder.call(method, request, server=self._server())
        while is_repeatable and entry.response is None and not entry.is_refused and time.monotonic() < until:
            await asyncio.sleep(UNAVAILABLE_SECONDS)
            entry = await self._recorder.call(method, request, server=self._server())
        if is_repeatable and entry.response is not None and self._chance.random() < 0.1:
            await self._recorder.call(method, request, server=self._server())
        if entry.response is None:
            return None
        if is_repeatable:
            self._accepted.append((method, request))
        job = entry.response.job if method != "BatchUpdateJobs" else entry.response.results[-1].job
        if job.revision:
            self._revision, self._attempt = job.revision, job.attempt
        return job


async def _any_of(*events: asyncio.Event, seconds: float) -> bool:
    """Wait until one of the events is set; return False after `seconds`."""
    waiting = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        done, _ = await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for each in waiting:
            each.cancel()
    return bool(done)


def _duration(seconds: float) -> duration_pb2.Duration:
    duration = duration_pb2.Duration()
    duration.FromTimedelta(timedelta(seconds=seconds))
    return duration
