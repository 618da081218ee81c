"""Follows the changes of jobs, and delivers each event at least once: those of one job in order, others side by side.

The resume token of the watch is saved once everything before it has been delivered. What was delivered beyond it is
saved too, so that a restart repeats only deliveries that were under way.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any, TypeVar

from jobstatus_grpc.client import AsyncJobStatusClient, AsyncJobsWatch, JobChange, JobChangeType
from jobstatus_grpc.client.retry import Backoff
from jobstatus_grpc.errors import InvalidTokenError, StoreUnreachableError
from jobstatus_grpc.job import Job, JobFilter
from jobstatus_grpc.relay.event import Event, entered_at, event_id
from jobstatus_grpc.relay.place import Delivered, Place, PlaceLostError
from jobstatus_grpc.relay.targets import DeliveryError, Target

log = logging.getLogger("jobstatus_grpc.relay")

T = TypeVar("T")

MAX_PENDING = 1000
"""Events that are not delivered yet. If there are more, the relay stops reading, and the server keeps the rest."""

LONGEST_PAUSE_SECONDS = 60.0
"""Limit of the pauses between tries, unless the receiver asks for a longer one."""

CLOCK_TOLERANCE = timedelta(minutes=10)
"""By how much ends may reach the relay out of the order of their times: servers' clocks differ, and commits overlap."""

OPEN_JOBS_PER_SAVE = MAX_PENDING
"""Open jobs that a first start saves at a time, no more than are saved later: a place may limit the time of a save."""

IDLE_SAVE_SECONDS = 30.0
"""Interval at which the token is saved while nothing is delivered: the service keeps changes for 24 hours."""

FINISH_SECONDS = 5.0
"""Time that deliveries under way have when the relay stops; those that do not end are repeated at the next start."""

UPDATE_INTERVAL_SECONDS = 60.0
"""How often the watch gets progress at most: it is not delivered. Other changes are sent at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RelaySettings:
    """What is delivered, and how."""

    filter: JobFilter
    is_each_state: bool = False
    """Whether each change of state is delivered, and not only the end."""
    source: str
    """Of the CloudEvents."""
    concurrency: int
    """Deliveries at a time."""
    retry_seconds: float
    """How long a delivery is retried before it is a dead letter."""
    dead_letter_file: str

    @property
    def watched(self) -> JobFilter:
        """The filter of the watch: for ends, of done jobs only."""
        return self.filter if self.is_each_state else self.filter & JobFilter(done=True)


@dataclass(slots=True, eq=False)
class _Pending:
    """A delivery, and the token that may be saved once it and all before it are over."""

    event: Event
    task: asyncio.Task[None] | None = None
    token: str = ""
    is_over: bool = False


class Relay:
    """Delivers the events of jobs to a target until it is stopped. For one event loop."""

    def __init__(
        self,
        client: AsyncJobStatusClient,
        target: Target,
        place: Place,
        settings: RelaySettings,
        *,
        to_object: Callable[[Job], Mapping[str, Any]],
    ) -> None:
        """`to_object` returns a job as the JSON object of its events."""
        self._client = client
        self._target = target
        self.place = place
        self._settings = settings
        self._to_object = to_object
        self._room = asyncio.Semaphore(MAX_PENDING)
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._pending: deque[_Pending] = deque()
        self._last_of_job: dict[str, _Pending] = {}
        self._unsaved: list[_Pending] = []
        """Those that are over."""
        self._has_unsaved = False
        """Whether the place has to be saved."""
        self._saving: asyncio.Task[None] | None = None
        self._token = place.token
        """The newest one that may be saved."""
        self._newest_at = place.horizon
        """The newest time of an event before that token."""
        self._is_taking = False
        """Whether a change is not among the pending ones yet: the token after it must not be saved."""
        self._is_stopping = False
        self._attempts: set[asyncio.Task[Any] | None] = set()
        """The tasks that deliver at the moment, and do not wait for their next try."""
        self._seen_since_reset: set[str] | None = None
        self._resume_at = 0.0
        """The time, of the loop's clock, before which the receiver wants no request."""
        self._failing_since: float | None = None
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self, stopping: asyncio.Event, *, begun: Callable[[], None]) -> None:
        """Deliver events until `stopping` is set; without a place, begin at now: what happened before is not delivered.

        `begun` is called once there is a place to deliver from.

        Raises:
            JobStatusError: the server cannot be reached at the first start, or the watch cannot go on.
            PlaceError: the place cannot be saved, or was lost. Deliveries that were under way are repeated.
        """
        # Before the first request: a list of many open jobs may take longer than a lease of the place.
        holding = asyncio.create_task(self.place.hold())
        holding.add_done_callback(self._note_failure)
        following = asyncio.create_task(self._begin_and_follow(begun))
        stop = asyncio.create_task(stopping.wait())
        ends: set[asyncio.Future[Any]] = {following, stop, self._failed}
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.cancel()
            following.cancel()
            await asyncio.wait({following})
            await self._finish()
            holding.cancel()
            await asyncio.wait({holding})
        errors = [each.exception() for each in (following, self._failed) if each.done() and not each.cancelled()]
        for error in filter(None, errors):
            raise error

    async def _begin_and_follow(self, begun: Callable[[], None]) -> None:
        if not self.place.token:
            await self._begin()
        begun()
        await self._follow()

    async def _begin(self) -> None:
        """Take the place of now."""
        began_at = time.monotonic()
        page = await self._client.list(self._settings.watched, page_size=1)
        if self._settings.is_each_state:
            await self._save_open_jobs()
        async with self._client.watch_jobs(self._settings.watched, resume_token=page.resume_token) as changes:
            while changes.server_time is None:
                await anext(changes)
            began = changes.server_time - timedelta(seconds=time.monotonic() - began_at)
        await self.place.save([], page.resume_token, began)
        self._token, self._newest_at = self.place.token, self.place.horizon

    async def _save_open_jobs(self) -> None:
        """Save the states of now as delivered; without a token, the next start does it again."""
        place, known = self.place, list[Delivered]()
        # Of a start that was interrupted: some may have ended since.
        await place.forget_open_jobs(unless=())
        async for job in self._client.list_all(self._settings.filter & JobFilter(done=False)):
            known.append(self._delivered_of(job))
            if len(known) == OPEN_JOBS_PER_SAVE:
                await place.save(known, place.token, place.horizon)
                known.clear()
        await place.save(known, place.token, place.horizon)

    async def _finish(self) -> None:
        self._is_stopping = True
        tasks = {each.task for each in self._pending if each.task is not None}
        for task in tasks - self._attempts:
            task.cancel()
        if tasks:
            # Another relay may deliver already if the place was lost.
            over: asyncio.Future[Any] = asyncio.ensure_future(asyncio.wait(tasks))
            await asyncio.wait({over, self._failed}, timeout=FINISH_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()
            await over
        if self._saving is not None:
            await asyncio.wait({self._saving})
        if not self._failed.done():
            await self._save()

    async def _follow(self) -> None:
        settings = self._settings
        try:
            async with self._client.watch_jobs(
                settings.watched,
                resume_token=self.place.token,
                min_update_interval_seconds=UPDATE_INTERVAL_SECONDS,
            ) as changes:
                idle = asyncio.create_task(self._save_while_idle(changes))
                try:
                    while True:
                        await self._room.acquire()
                        change = await anext(changes)
                        self._is_taking = True
                        if not await self._take(change):
                            self._room.release()
                        self._is_taking = False
                        self._note(changes.resume_token)
                finally:
                    idle.cancel()
        except InvalidTokenError:
            raise InvalidTokenError(
                "the state file was made for other filter flags, another tenant or another server; "
                "give this relay another --state-file"
            ) from None

    async def _save_while_idle(self, changes: AsyncJobsWatch) -> None:
        while True:
            await asyncio.sleep(IDLE_SAVE_SECONDS)
            if not self._is_taking:
                self._note(changes.resume_token)

    async def _take(self, change: JobChange) -> bool:
        """Take a change; return whether a delivery has begun."""
        if change.type is JobChangeType.RESET:
            self._seen_since_reset = set()
            log.warning(
                "the server no longer has all changes since the last delivery; what is still stored is delivered now, "
                "but jobs that were removed in between are missed%s",
                ", and so may be states in between" if self._settings.is_each_state else "",
            )
        elif change.type is JobChangeType.SYNCED and self._seen_since_reset is not None:
            await self.place.forget_open_jobs(unless=self._seen_since_reset)
            self._seen_since_reset = None
        elif change.type is JobChangeType.REMOVED:
            await self.place.forget(change.id)
        elif change.job is not None:
            if self._seen_since_reset is not None:
                self._seen_since_reset.add(change.id)
            if await self._is_due(change.job):
                self._begin_delivery(change.job)
                return True
        return False

    async def _is_due(self, job: Job) -> bool:
        """Return whether the event that the job is in its state is to be delivered."""
        before = self._last_of_job.get(job.id)
        last = before.event.id if before is not None else await self.place.last_event(job.id)
        if last == event_id(self._settings.source, job):
            return False
        if self._seen_since_reset is None:
            return True
        # Snapshots have ends of before the relay began, and ends whose delivery is so long ago that it is forgotten.
        return not job.done or last is not None or entered_at(job) > self.place.horizon

    def _begin_delivery(self, job: Job) -> None:
        source = self._settings.source
        event = Event(id=event_id(source, job), source=source, job=job, data=self._to_object(job))
        pending = _Pending(event)
        pending.task = asyncio.create_task(self._deliver(pending, self._last_of_job.get(job.id)))
        pending.task.add_done_callback(self._note_failure)
        self._last_of_job[job.id] = pending
        self._pending.append(pending)

    def _note(self, token: str) -> None:
        """Note that all changes up to a token have been taken."""
        if not token:
            return
        if self._pending:
            self._pending[-1].token = token
        elif token != self._token:
            self._token = token
            self._save_soon()

    async def _deliver(self, pending: _Pending, before: _Pending | None) -> None:
        """Deliver an event after the one before it of the same job."""
        if before is not None and before.task is not None:
            await asyncio.wait({before.task})
        event = pending.event
        error = await self._try_until_delivered(event)
        if error is not None:
            await self._write_dead_letter(event, error)
        pending.is_over = True
        self._unsaved.append(pending)
        self._save_soon()
        self._room.release()

    async def _try_until_delivered(self, event: Event) -> DeliveryError | None:
        """Return the last error once the time for tries is over; None: the event was delivered."""
        clock = asyncio.get_running_loop().time
        backoff, give_up_at = Backoff(LONGEST_PAUSE_SECONDS), clock() + self._settings.retry_seconds
        while True:
            async with self._slots:
                # In a loop: another delivery may have been asked for a longer pause in between.
                while (pause_seconds := self._resume_at - clock()) > 0:  # noqa: ASYNC110
                    await asyncio.sleep(pause_seconds)
                self.place.check()
                task = asyncio.current_task()
                self._attempts.add(task)
                try:
                    await self._target.deliver(event)
                except DeliveryError as error:
                    self._note_error(event, error)
                    self._resume_at = max(self._resume_at, clock() + error.retry_after_seconds)
                    last = error
                else:
                    self._note_success()
                    return None
                finally:
                    self._attempts.discard(task)
            if self._is_stopping:
                raise asyncio.CancelledError
            left_seconds = give_up_at - clock()
            if left_seconds <= 0:
                return last
            await asyncio.sleep(min(backoff.pause_seconds(), left_seconds))

    def _note_error(self, event: Event, error: DeliveryError) -> None:
        if self._failing_since is None:
            self._failing_since = time.monotonic()
            log.warning(
                "%s: event %s (job %s %s) was not delivered: %s. It is tried again, as are others that fail",
                self._target.name,
                event.id,
                event.job.id,
                event.job.state.word,
                error,
            )

    def _note_success(self) -> None:
        if self._failing_since is not None:
            seconds, self._failing_since = time.monotonic() - self._failing_since, None
            log.warning("%s: events are delivered again, after %.1f s", self._target.name, seconds)

    async def _write_dead_letter(self, event: Event, error: DeliveryError) -> None:
        path = self._settings.dead_letter_file
        letter = {
            "failedAt": datetime.now(timezone.utc).isoformat(),
            "target": self._target.name,
            "error": str(error),
            "event": event.envelope,
        }
        while True:
            try:
                append_line(path, json.dumps(letter, ensure_ascii=False))
                break
            except OSError as problem:
                log.error("%s cannot be written, and is tried again: %s", path, problem.strerror)
                await asyncio.sleep(LONGEST_PAUSE_SECONDS)
        log.error(
            "%s: event %s (job %s %s) was given up after %g s, and is in %s: %s",
            self._target.name,
            event.id,
            event.job.id,
            event.job.state.word,
            self._settings.retry_seconds,
            path,
            error,
        )

    def _delivered_of(self, job: Job) -> Delivered:
        return Delivered(job.id, event_id(self._settings.source, job), entered_at(job), job.done)

    def _save_soon(self) -> None:
        self._has_unsaved = True
        if self._saving is None:
            self._saving = asyncio.create_task(self._save_all())
            self._saving.add_done_callback(self._note_failure)

    async def _save_all(self) -> None:
        """Save until there is nothing to save: deliveries that end during a save are saved together by the next."""
        try:
            await asyncio.sleep(0)  # for those that end in this turn of the loop
            while self._has_unsaved:
                await self._save()
        finally:
            self._saving = None

    async def _save(self) -> None:
        self._has_unsaved = False
        while self._pending and self._pending[0].is_over:
            over = self._pending.popleft()
            self._token = over.token or self._token
            self._newest_at = max(self._newest_at, over.event.at)
        horizon = self.place.horizon
        if self._token != self.place.token:
            # A time in the future is of a server whose clock is wrong.
            horizon = max(horizon, min(self._newest_at, datetime.now(timezone.utc)) - CLOCK_TOLERANCE)
        saved, self._unsaved = self._unsaved, []
        await self.place.save([self._delivered_of(each.event.job) for each in saved], self._token, horizon)
        for each in saved:  # `_is_due` finds them in the place from now on
            if self._last_of_job.get(each.event.job.id) is each:
                del self._last_of_job[each.event.job.id]

    def _note_failure(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if not self._failed.done():
            self._failed.set_exception(error)


async def keep_relaying(
    client: AsyncJobStatusClient,
    target: Target,
    settings: RelaySettings,
    open_place: Callable[[], Awaitable[Place]],
    stopping: asyncio.Event,
    *,
    to_object: Callable[[Job], Mapping[str, Any]],
    begun: Callable[[], None],
) -> None:
    """Deliver events until `stopping` is set, whenever this relay has the place.

    Args:
        client: of the server.
        target: to which events are delivered.
        settings: which events, and how.
        open_place: returns the place once this relay has it.
        stopping: ends it.
        to_object: returns a job as the JSON object of its events.
        begun: called each time that it begins to deliver.

    Raises:
        CannotStartError: the place cannot be used, or was never reached.
        JobStatusError: the server cannot be reached at the first start, or the watch cannot go on.
        PlaceError: the place cannot be saved.
    """
    backoff, was_reached = Backoff(), False

    def note_begun() -> None:
        backoff.reset()
        begun()

    while not stopping.is_set():
        try:
            place = await _unless(stopping, open_place())
            if place is None:
                return
            try:
                await Relay(client, target, place, settings, to_object=to_object).run(stopping, begun=note_begun)
            finally:
                await place.close()
            return
        except PlaceLostError as error:
            problem: Exception = error
        except StoreUnreachableError as error:
            if not was_reached:
                raise
            problem = error
        was_reached = True
        log.warning("%s; this relay delivers nothing until it has it again", problem)
        await _unless(stopping, asyncio.sleep(backoff.pause_seconds()))


async def _unless(stopping: asyncio.Event, work: Awaitable[T]) -> T | None:
    """Return what `work` returns; None: it was cancelled, because `stopping` was set before its end."""
    task, stop = asyncio.ensure_future(work), asyncio.create_task(stopping.wait())
    await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
    return None if task.cancelled() else task.result()


def append_line(path: str, line: str) -> None:
    """Append a line to a file, durably; a file that is created is for its owner only.

    Raises:
        OSError: it is not written, and nothing of it is in the file.
    """
    append(path, line.encode() + b"\n")


def append(path: str, data: bytes) -> None:
    """As append_line, of bytes; without any, the file is created if it is missing."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with contextlib.closing(os.fdopen(descriptor, "ab", buffering=0)) as file:
        size, left = os.fstat(descriptor).st_size, memoryview(data)
        try:
            while left:  # a disk that becomes full takes a part, without an error
                left = left[file.write(left) :]
            os.fsync(descriptor)
        except OSError:
            with contextlib.suppress(OSError):  # no regular file
                os.ftruncate(descriptor, size)
            raise
