"""The jobs that the client of one WatchJobs stream has been sent, and the newest unsent change of each.

No I/O and no clock: callers pass the event loop's time. A job is in one of these states, for one backlog:

* unknown: the client does not have it. A change that matches the filter makes it unsent.
* held: the client has it, as of a revision; the most common state, and the cheapest in memory.
* unsent: its newest change waits in `_unsent` and in `_queue`, where min_update_interval says when it is due. `take`
  makes it held (UPDATED) or unknown (REMOVED). A job that was never sent and no longer matches is unknown again.

A removal stands for two changes, the end of the job and its removal, where the client does not have the end.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, NamedTuple, TypeAlias, TypeVar

from jobstatus_grpc.job import NO_NUMBERS, Job, JobFilter, ShownNumbers, shown_numbers, urgent_mark, visible
from jobstatus_grpc.job.limits import MAX_RESPONSE_BYTES
from jobstatus_grpc.stores.interface import Change, Position
from jobstatus_grpc.watch.watcher import CLOCK_RESOLUTION_SECONDS, EventType, OnDelivery, RenderJobsEvent

MAX_EVENTS = 256
"""Events in one message, at most, and jobs in one page of a snapshot. Large jobs reach MAX_RESPONSE_BYTES earlier."""

UNKNOWN_REVISION = 0
"""The revision of a job that the client has or may have, as of some state: any change of it is sent."""

HELD_JOB_BYTES = 200
"""The memory of a job that a client has: its entries, and a share of the HeldJob."""

FILTER_ID_BYTES = 750
"""The memory of an id of a filter, here and in the hub."""

NEVER_SENT = -1
"""The revision of a job that the client does not have: its removal before it was sent is no event."""

Owner = TypeVar("Owner", bound=Hashable)
"""What a backlog is known by to the hub: its watcher."""


class News:
    """A change, the feed's position before it, and its events rendered once for all watchers."""

    __slots__ = ("_rendered", "before", "change", "is_of_children")

    def __init__(self, change: Change, before: Position, *, is_of_children: bool = False) -> None:
        self.change = change
        self.is_of_children = is_of_children
        """The job has not changed, but perhaps the numbers of its children."""
        self.before = before
        self._rendered: dict[tuple[EventType, bool], bytes] = {}

    def event(self, event_type: EventType, render: RenderJobsEvent, *, of_end: bool = False) -> bytes:
        """Return the bytes of the change's event; `of_end`: of the end of a job that was removed since."""
        rendered = self._rendered.get((event_type, of_end))
        if rendered is None:
            change, final = self.change, self.change.final
            if of_end and final is not None:
                change = Change(change.tenant, change.id, final.revision, final)
            rendered = self._rendered[event_type, of_end] = render(event_type, change)
        return rendered


class HeldJob(Generic[Owner]):
    """A job that clients have or will be sent: the revision of each client, and that of the last urgent change."""

    __slots__ = ("_mark", "_revision", "revisions", "urgent_revision")

    def __init__(self) -> None:
        self.revisions: dict[Owner, int] = {}
        """By backlog: the revision that its client has, UNKNOWN_REVISION or NEVER_SENT."""
        self.urgent_revision = 0
        """The newest known revision that min_update_interval must not hold back."""
        self._revision = 0
        self._mark = 0

    def observe(self, job: Job) -> None:
        """Compare a state with the newest one that was observed, unless it is older."""
        if job.revision > self._revision:
            mark = urgent_mark(job)
            if mark != self._mark:
                self.urgent_revision = job.revision
            self._revision, self._mark = job.revision, mark


HeldJobs: TypeAlias = dict[tuple[str, str], HeldJob[Owner]]
"""By tenant and id; one for all backlogs of a hub, which finds through it the watchers of a job that stops matching."""


class _Unsent(NamedTuple):
    news: News
    matches: bool
    end_matches: bool | None
    """Of a removal, whether the job matched as it ended; None: there is no end that the client does not have."""
    due_at: float
    number: int
    """That of its place in the queue; a place with another number is obsolete."""

    def events(self, render: RenderJobsEvent) -> list[bytes]:
        if self.matches:
            return [self.news.event(EventType.UPDATED, render)]
        if self.end_matches is None:
            return [self.news.event(EventType.REMOVED, render)]
        if self.end_matches:
            updated = self.news.event(EventType.UPDATED, render, of_end=True)
            return [updated, self.news.event(EventType.REMOVED, render)]
        return [self.news.event(EventType.REMOVED, render, of_end=True)]


class Backlog(Generic[Owner]):
    """Keeps, for one client, the revision of each job that it has, and at most one unsent change of each.

    Unsent changes are in two orders. In the feed's order the first gives the position up to which the client has
    everything. In the order in which they became due they are sent: a job that changes all the time keeps its place.
    """

    __slots__ = (
        "_all_held",
        "_children",
        "_held",
        "_interval_ends_at",
        "_last_number",
        "_min_update_seconds",
        "_on_delivery",
        "_owner",
        "_queue",
        "_removed",
        "_unsent",
        "filter",
        "guesses",
        "is_incomplete",
        "only",
        "tenant",
    )  # fmt: skip

    def __init__(
        self,
        owner: Owner,
        tenant: str,
        job_filter: JobFilter,
        held: HeldJobs[Owner],
        *,
        min_update_seconds: float,
        only: JobFilter | None = None,
        on_delivery: OnDelivery | None = None,
    ) -> None:
        self.tenant = tenant
        self.filter = job_filter
        self.only = only
        """The jobs that the client may see; None: all. Of another one, which it has, it gets the bare removal."""
        self.is_incomplete = False
        """Whether the client may have jobs that are not held here: then every change that may concern it is sent."""
        self.guesses = 0
        """The number of jobs sent as REMOVED for that reason alone: most of them may never have matched."""
        self._on_delivery = on_delivery
        self._owner = owner
        self._all_held = held
        self._min_update_seconds = min_update_seconds
        self._held: dict[str, HeldJob[Owner]] = {}
        self._children: dict[str, ShownNumbers] = {}
        """The numbers of children that the client has, of jobs with any."""
        self._removed: dict[str, int] = {}
        """The revisions of jobs that were removed while `is_incomplete`, since `forget_removed`."""
        self._unsent: OrderedDict[str, _Unsent] = OrderedDict()
        """In the feed's order. Each of these jobs is in `_held` too."""
        self._queue: list[tuple[float, int, str]] = []
        """A heap of places: when a change is due, its number, its job. The first place is never obsolete."""
        self._last_number = 0
        self._interval_ends_at: OrderedDict[str, float] = OrderedDict()
        """Of jobs sent within min_update_interval, in the order of sending."""

    @property
    def before(self) -> Position | None:
        """The feed's position before the oldest unsent change; None: everything was sent."""
        for unsent in self._unsent.values():
            return unsent.news.before
        return None

    @property
    def held_bytes(self) -> int:
        """About the memory that the filter and the client's jobs take."""
        return FILTER_ID_BYTES * len(self.filter.ids) + HELD_JOB_BYTES * len(self._held)

    @property
    def next_due_at(self) -> float | None:
        """When the next change may be sent, which may be in the past; None: nothing is unsent."""
        return self._queue[0][0] if self._queue else None

    def is_due(self, now: float) -> bool:
        """Return whether a change may be sent now."""
        return bool(self._queue) and self._queue[0][0] <= now + CLOCK_RESOLUTION_SECONDS

    def hold(self, job: Job, *, revision: int | None = None) -> None:
        """Record that the client has a job that matches.

        Args:
            job: as it is known here.
            revision: the client's, if another.
        """
        self._hold(job.id, job.revision if revision is None else revision).observe(job)
        if job.children:
            self._children[job.id] = shown_numbers(job)
        else:
            self._children.pop(job.id, None)

    def holds(self, job_id: str) -> bool:
        """Return whether the client is known to have a job."""
        return job_id in self._held

    def hold_unless_removed(self, job_id: str) -> None:
        """Record that the client may have a job, in a state that may not match: its next change is sent."""
        if job_id not in self._held and job_id not in self._removed:
            self._hold(job_id, UNKNOWN_REVISION)

    def forget_removed(self) -> None:
        """Free memory: the hub has published all changes that were added so far, and no older one follows."""
        self._removed.clear()

    def may_concern(self, change: Change) -> bool:
        """Return whether the job matches, or may have matched before."""
        job = change.known_job
        if job is not None:
            return self.filter.may_have_matched(job)
        return not self.filter.ids or change.id in self.filter.ids

    def add(self, news: News, now: float) -> float | None:
        """Keep a change, in place of an older one of its job, if it concerns the client.

        Returns:
            When it may be sent; None: it was not kept.
        """
        change, job = news.change, news.change.job
        held, unsent = self._held.get(change.id), self._unsent.get(change.id)
        sent_revision = NEVER_SENT if held is None else held.revisions[self._owner]
        client_revision = sent_revision if held is not None else self._removed.get(change.id, NEVER_SENT)
        known_revision = client_revision if unsent is None else unsent.news.change.revision
        if change.revision < known_revision:
            return None
        if change.revision == known_revision:
            is_known = job is None or shown_numbers(job) == self._children.get(job.id, NO_NUMBERS)
            if not news.is_of_children:
                return None
            if is_known and change.revision == client_revision:
                if unsent is not None:  # other numbers, which are obsolete before they were sent
                    del self._unsent[change.id]
                    self._drop_obsolete_places()
                return None
        matches = job is not None and self.filter.matches(job)
        if news.is_of_children and not matches:
            return None  # its own change has been in the feed, or follows
        end_matches: bool | None = None
        if change.final is not None and change.final.revision > client_revision:
            end_matches = self.filter.matches(change.final)
        if held is None:
            if self.is_incomplete and client_revision == NEVER_SENT and self.may_concern(change):
                sent_revision = UNKNOWN_REVISION
                self.guesses += not matches and not end_matches
            elif not matches and not end_matches:
                return None
            # From now on, the hub must find this backlog when the job stops matching.
            held = self._hold(change.id, sent_revision)
        elif not matches and not end_matches and sent_revision == NEVER_SENT:
            self._release(change.id)
            self._drop_obsolete_places()
            return None
        due_at = now
        if unsent is not None and unsent.due_at <= now + CLOCK_RESOLUTION_SECONDS:
            due_at = unsent.due_at
        elif matches:
            assert job is not None
            held.observe(job)
            if held.urgent_revision <= sent_revision:
                due_at = max(now, self._interval_ends_at.get(change.id, now))
        if self.only is not None and visible(change.known_job, self.only) is None:
            news, end_matches = News(Change(change.tenant, change.id, change.revision, None), news.before), None
        is_in_place = unsent is not None and unsent.due_at == due_at
        number = unsent.number if unsent is not None and is_in_place else self._enqueue(change.id, due_at)
        self._unsent[change.id] = _Unsent(news, matches, end_matches, due_at, number)
        self._unsent.move_to_end(change.id)
        return due_at

    def take(self, now: float, render: RenderJobsEvent) -> list[bytes]:
        """Return the events that are due, at most as many as fit one message, as sent."""
        self._forget_intervals(now)
        events: list[bytes] = []
        size = 0
        while len(events) < MAX_EVENTS and self.is_due(now):
            job_id = self._queue[0][2]
            unsent = self._unsent[job_id]
            next_events = unsent.events(render)
            size += sum(map(len, next_events))
            if events and (size > MAX_RESPONSE_BYTES or len(events) + len(next_events) > MAX_EVENTS):
                break
            events += next_events
            if self._on_delivery is not None and not unsent.news.is_of_children and unsent.news.change.job is not None:
                self._on_delivery(unsent.news.change.job)
            self._mark_sent(unsent, now)
            self._drop_obsolete_places()
        return events

    def clear(self) -> None:
        """Make every job unknown."""
        for job_id in list(self._held):
            self._release(job_id)
        self._queue.clear()
        self._removed.clear()
        self.is_incomplete = False
        self.guesses = 0

    def _enqueue(self, job_id: str, due_at: float) -> int:
        if len(self._queue) > 2 * len(self._unsent) + MAX_EVENTS:  # most places are obsolete
            self._queue = sorted((unsent.due_at, unsent.number, job_id) for job_id, unsent in self._unsent.items())
        self._last_number += 1
        heapq.heappush(self._queue, (due_at, self._last_number, job_id))
        return self._last_number

    def _drop_obsolete_places(self) -> None:
        """Drop those at the front of the queue."""
        while self._queue:
            _, number, job_id = self._queue[0]
            unsent = self._unsent.get(job_id)
            if unsent is not None and unsent.number == number:
                break
            heapq.heappop(self._queue)

    def _mark_sent(self, unsent: _Unsent, now: float) -> None:
        change = unsent.news.change
        if not unsent.matches:
            self._release(change.id)
            if self.is_incomplete:
                self._removed[change.id] = change.revision
            return
        assert change.job is not None
        del self._unsent[change.id]
        self.hold(change.job)
        if self._min_update_seconds:
            self._interval_ends_at[change.id] = now + self._min_update_seconds
            self._interval_ends_at.move_to_end(change.id)

    def _forget_intervals(self, now: float) -> None:
        """Forget those that are over."""
        while self._interval_ends_at:
            job_id, ends_at = next(iter(self._interval_ends_at.items()))
            if ends_at > now + CLOCK_RESOLUTION_SECONDS:
                break
            del self._interval_ends_at[job_id]

    def _hold(self, job_id: str, revision: int) -> HeldJob[Owner]:
        held = self._held.get(job_id)
        if held is None:
            key = (self.tenant, job_id)
            held = self._held[job_id] = self._all_held.get(key) or self._all_held.setdefault(key, HeldJob())
        held.revisions[self._owner] = revision
        return held

    def _release(self, job_id: str) -> None:
        held = self._held.pop(job_id)
        del held.revisions[self._owner]
        if not held.revisions:
            del self._all_held[self.tenant, job_id]
        self._unsent.pop(job_id, None)
        self._children.pop(job_id, None)
        self._interval_ends_at.pop(job_id, None)
