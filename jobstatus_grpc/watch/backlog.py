"""What one watcher of many jobs has told its reader, and what waits to be told: the newest change of each job."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from jobstatus_grpc.job import Job, JobFilter, urgent_mark
from jobstatus_grpc.job.limits import MAX_RESPONSE_BYTES
from jobstatus_grpc.stores.interface import Change, Position
from jobstatus_grpc.watch.watcher import CLOCK_RESOLUTION_SECONDS, EventType

if TYPE_CHECKING:
    from jobstatus_grpc.watch.filter_watch import FilterWatcher

MAX_EVENTS = 256

UNKNOWN_REVISION = 0
"""Of a job that the reader holds or may hold: any change of it is news."""

NOT_TOLD = -1
"""Of a job that waits to be told for the first time: until then its end is no news."""

RenderEvent: TypeAlias = Callable[[EventType, Change | None], bytes]


class News:
    """A change that concerns some watchers, where the feed stood before it, and its event rendered for all of them."""

    __slots__ = ("_rendered", "before", "change")

    def __init__(self, change: Change, before: Position) -> None:
        self.change = change
        self.before = before
        self._rendered: dict[EventType, bytes] = {}

    def event(self, event_type: EventType, render: RenderEvent) -> bytes:
        """Return the event's bytes, rendered once."""
        rendered = self._rendered.get(event_type)
        if rendered is None:
            rendered = self._rendered[event_type] = render(event_type, self.change)
        return rendered


class HeldJob:
    """A job that readers hold: the revision that each of them has, and what all need to tell whether news is urgent."""

    __slots__ = ("_mark", "_revision", "revisions", "urgent_revision")

    def __init__(self) -> None:
        self.revisions: dict[FilterWatcher, int] = {}
        self.urgent_revision = 0
        """The newest known revision that min_update_interval must not hold back."""
        self._revision = 0
        self._mark = 0

    def note(self, job: Job) -> None:
        """Take notice of a state, unless a newer one is known."""
        if job.revision > self._revision:
            mark = urgent_mark(job)
            if mark != self._mark:
                self.urgent_revision = job.revision
            self._revision, self._mark = job.revision, mark


HeldJobs: TypeAlias = dict[tuple[str, str], HeldJob]
"""By tenant and id; shared by all watchers."""


class Backlog:
    """Knows which jobs a reader holds, and keeps at most the newest change of each that matches or is held.

    Two orders: changes stand in the order of the feed, so that the first tells up to where all was told; those that
    are due are told first come first served, so that a job that never rests does not stand behind the others for ever.
    """

    __slots__ = (
        "_all_held", "_due_at", "_held", "_min_update_seconds", "_owner", "_ready", "_throttled", "_updated_at",
        "_waiting", "filter", "is_unsure", "tenant",
    )  # fmt: skip

    def __init__(
        self, owner: FilterWatcher, tenant: str, job_filter: JobFilter, held: HeldJobs, *, min_update_seconds: float
    ) -> None:
        self.tenant = tenant
        self.filter = job_filter
        self.is_unsure = False
        """Whether the reader may hold jobs that are not known here: then every change that may concern it is news."""
        self._owner = owner
        self._all_held = held
        self._min_update_seconds = min_update_seconds
        self._held: dict[str, HeldJob] = {}
        self._waiting: OrderedDict[str, tuple[News, bool]] = OrderedDict()
        self._ready: OrderedDict[str, None] = OrderedDict()
        self._due_at: dict[str, float] = {}
        self._throttled: list[tuple[float, str]] = []
        self._updated_at: OrderedDict[str, float] = OrderedDict()

    @property
    def before(self) -> Position | None:
        """Up to where all was told; None where nothing waits."""
        for news, _ in self._waiting.values():
            return news.before
        return None

    @property
    def ready(self) -> int:
        """How many changes may be told now."""
        return len(self._ready)

    @property
    def next_due_at(self) -> float | None:
        """When the next change may be told, at the earliest; None where none is held back."""
        return self._throttled[0][0] if self._throttled else None

    def hold(self, job: Job, *, revision: int | None = None) -> None:
        """Note that the reader holds a job that matches.

        Args:
            job: as it is known here.
            revision: the one that the reader has, if another.
        """
        self._hold(job.id, job.revision if revision is None else revision).note(job)

    def holds(self, job_id: str) -> bool:
        """Tell whether the reader is known to hold a job."""
        return job_id in self._held

    def may_concern(self, change: Change) -> bool:
        """Tell whether the job matches, or may have matched: of one that is gone, only its id is known."""
        if change.job is not None:
            return self.filter.may_match(change.job)
        return not self.filter.ids or change.id in self.filter.ids

    def offer(self, news: News, now: float) -> float | None:
        """Take a change; return when it may be told, None where it is none of the reader's."""
        change, job = news.change, news.change.job
        held = self._held.get(change.id)
        waiting = self._waiting.get(change.id)
        if held is not None and change.revision <= held.revisions[self._owner]:
            return None
        if waiting is not None and change.revision <= waiting[0].change.revision:
            return None
        matches = job is not None and self.filter.matches(job)
        if held is None:
            is_news = self.is_unsure and self.may_concern(change)
            if not is_news and not matches:
                return None
            # What waits is held too: the hub must find this watcher when the job stops matching.
            held = self._hold(change.id, UNKNOWN_REVISION if is_news else NOT_TOLD)
        elif not matches and held.revisions[self._owner] == NOT_TOLD:
            self._drop(change.id)
            return None
        self._waiting[change.id] = (news, matches)
        self._waiting.move_to_end(change.id)
        if change.id in self._ready:
            return now
        if matches:
            assert job is not None
            held.note(job)
            if held.urgent_revision <= held.revisions[self._owner]:
                return self._throttle(change.id, now)
        self._due_at.pop(change.id, None)
        self._ready[change.id] = None
        return now

    def take(self, now: float, render: RenderEvent) -> list[bytes]:
        """Return the events that are due, as many as one message holds."""
        self._ripen(now)
        events: list[bytes] = []
        size = 0
        while self._ready and len(events) < MAX_EVENTS:
            job_id = next(iter(self._ready))
            news, matches = self._waiting[job_id]
            event = news.event(EventType.UPDATED if matches else EventType.REMOVED, render)
            size += len(event)
            if events and size > MAX_RESPONSE_BYTES:
                break
            events.append(event)
            self._note_told(news.change, matches, now)
        return events

    def clear(self) -> None:
        """Forget everything."""
        for job_id in list(self._held):
            self._release(job_id)
        for jobs in (self._waiting, self._ready, self._due_at, self._updated_at):
            jobs.clear()
        self._throttled.clear()
        self.is_unsure = False

    def _note_told(self, change: Change, matches: bool, now: float) -> None:
        del self._ready[change.id], self._waiting[change.id]
        self._updated_at.pop(change.id, None)
        if not matches:
            self._release(change.id)
            return
        assert change.job is not None
        self.hold(change.job)
        if self._min_update_seconds:
            self._updated_at[change.id] = now

    def _throttle(self, job_id: str, now: float) -> float:
        """Hold a change back until the job's interval is over."""
        due_at = self._updated_at.get(job_id, float("-inf")) + self._min_update_seconds
        if due_at <= now + CLOCK_RESOLUTION_SECONDS:
            self._due_at.pop(job_id, None)
            self._ready[job_id] = None
            return now
        if self._due_at.get(job_id) != due_at:
            self._due_at[job_id] = due_at
            heapq.heappush(self._throttled, (due_at, job_id))
            if len(self._throttled) > 2 * len(self._due_at) + MAX_EVENTS:  # most of them were told earlier
                self._throttled = sorted((due_at, job_id) for job_id, due_at in self._due_at.items())
        return due_at

    def _ripen(self, now: float) -> None:
        """Let those whose interval is over stand among those that are due."""
        now += CLOCK_RESOLUTION_SECONDS
        while self._throttled and self._throttled[0][0] <= now:
            due_at, job_id = heapq.heappop(self._throttled)
            if self._due_at.get(job_id) == due_at:
                del self._due_at[job_id]
                self._ready[job_id] = None
        while self._updated_at:
            job_id, updated_at = next(iter(self._updated_at.items()))
            if updated_at + self._min_update_seconds > now:
                break
            del self._updated_at[job_id]

    def _hold(self, job_id: str, revision: int) -> HeldJob:
        held = self._held.get(job_id)
        if held is None:
            key = (self.tenant, job_id)
            held = self._held[job_id] = self._all_held.get(key) or self._all_held.setdefault(key, HeldJob())
        held.revisions[self._owner] = revision
        return held

    def _release(self, job_id: str) -> None:
        held = self._held.pop(job_id, None)
        if held is not None:
            del held.revisions[self._owner]
            if not held.revisions:
                del self._all_held[self.tenant, job_id]

    def _drop(self, job_id: str) -> None:
        self._release(job_id)
        del self._waiting[job_id]
        del self._ready[job_id]
