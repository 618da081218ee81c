"""Judge a history: which promises of the service does it break? Each rule is a function, its docstring the promise.

The server numbers the changes of each job, so no search for a possible order of calls is needed: sorting is enough.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.job import Job, JobFilter
from jobstatus_grpc.verify.history import Entry
from jobstatus_grpc.wire import convert

PATIENCE_SECONDS = 5.0
"""Time within which a watcher must receive a change: generous beside the milliseconds that it takes, so that a busy
machine is no violation."""

LARGEST_ROUNDING_ERROR = 1e-5
"""Of a mean progress in percent: the service may count in steps of a millionth."""

LATE_SECONDS = 5.0
"""How long after its end a call that was not answered may still take effect: the server may wait for a lock."""

DONE = frozenset({pb.JOB_STATE_SUCCEEDED, pb.JOB_STATE_ABORTED, pb.JOB_STATE_FAILED, pb.JOB_STATE_CANCELLED})


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken promise."""

    rule: str
    text: str
    entries: tuple[Entry, ...]
    """The entries that show it, and all writes to the job: checked alone, they show it again."""


def check(entries: Iterable[Entry], *, patience_seconds: float = PATIENCE_SECONDS) -> list[Violation]:
    """Return the violations in a history, in the order of the rules."""
    history = _History(entries, patience_seconds)
    return [violation for rule in RULES for violation in _of_rule(rule, history)]


def name_of(function: Callable[..., Any]) -> str:
    """Return the name of a rule or of a check as it is printed."""
    return function.__name__.replace("_", "-")


def _of_rule(rule: _Rule, history: _History) -> Iterator[Violation]:
    name = name_of(rule)
    for job_id, text, *shown in rule(history):
        if job_id:
            job = history.job(job_id)
            shown += [write.entry for write in job.writes] + job.deletes
            text = f"{job_id}: {text}"
        entries = {entry.number: entry for entry in shown}
        yield Violation(name, text, tuple(sorted(entries.values(), key=attrgetter("started_at"))))


@dataclass(frozen=True, slots=True, eq=False)
class _Sighting:
    """A job in a response."""

    job: Any
    entry: Entry
    at: float
    """When it was received."""
    since: float
    """It was read after this time; -inf if only the order in its stream is known."""
    is_whole: bool = True
    """False: of a batch, which omits fields."""


@dataclass(frozen=True, slots=True)
class _Write:
    """A request that may change a job. Repeats of it, with its request_id, have the same key."""

    entry: Entry
    request: Any
    """Of CreateJob, UpdateJob (also one in a batch) or CancelJob."""
    key: object
    job: Any
    """In the response; None without one."""
    is_refused: bool

    @property
    def mark(self) -> str:
        """The reason that it writes: a write with one of its own can be recognised in the job."""
        request = self.request
        if isinstance(request, pb.CancelJobRequest):
            return ""
        has_mask = isinstance(request, pb.UpdateJobRequest) and request.HasField("update_mask")
        return "" if has_mask and "reason" not in request.update_mask.paths else str(request.job.reason)

    @property
    def is_heartbeat(self) -> bool:
        """Whether it writes no field."""
        request = self.request
        if not isinstance(request, pb.UpdateJobRequest) or request.allow_missing:
            return False
        if request.HasField("update_mask"):
            return not request.update_mask.paths
        return {descriptor.name for descriptor, _ in request.job.ListFields()} <= {"id"}


@dataclass(slots=True)
class _Job:
    """All that a history has on one job."""

    id: str
    sightings: list[_Sighting] = field(default_factory=list)
    writes: list[_Write] = field(default_factory=list)
    deletes: list[Entry] = field(default_factory=list)
    misses: list[Entry] = field(default_factory=list)
    """Calls that were answered with NOT_FOUND."""
    by_revision: dict[int, _Sighting] = field(default_factory=dict)
    """The first whole sighting of each revision."""
    own_marks: dict[str, object] = field(default_factory=dict)
    """The reasons that only one write has, with its key."""
    repeated_keys: set[object] = field(default_factory=set)
    """Of requests that were sent more than once: the response to a repeat is the job in its newest state."""
    _times: list[float] = field(default_factory=list)
    _newest: list[_Sighting] = field(default_factory=list)

    def index(self) -> None:
        """Prepare the fields that are derived from others."""
        counts = Counter(write.key for write in self.writes)
        self.repeated_keys = {key for key, count in counts.items() if count > 1}
        keys_of: dict[str, set[object]] = defaultdict(set)
        for write in self.writes:
            if write.mark:
                keys_of[write.mark].add(write.key)
        self.own_marks = {mark: key for mark, (key, *others) in keys_of.items() if not others}
        for sighting in sorted(self.sightings, key=attrgetter("at")):
            if not self._newest or sighting.job.revision > self._newest[-1].job.revision:
                self._times.append(sighting.at)
                self._newest.append(sighting)
            if sighting.is_whole:
                self.by_revision.setdefault(sighting.job.revision, sighting)

    def is_marked(self, write: _Write) -> bool:
        """Return whether no other write has the reason of this one."""
        return self.own_marks.get(write.mark) == write.key

    def newest_at(self, at: float) -> _Sighting | None:
        """Return the newest revision that a client had received before `at`."""
        place = bisect.bisect_left(self._times, at)
        return self._newest[place - 1] if place else None

    @property
    def newest(self) -> _Sighting | None:
        """The newest revision that was received."""
        return self._newest[-1] if self._newest else None

    @property
    def newest_whole(self) -> _Sighting | None:
        """The newest revision that was received with all fields."""
        return self.by_revision[max(self.by_revision)] if self.by_revision else None

    @property
    def end(self) -> _Sighting | None:
        """The first revision in a final state that was received."""
        ends = (sighting for sighting in self.sightings if sighting.job.state in DONE)
        return min(ends, key=lambda sighting: sighting.job.revision, default=None)

    @property
    def deleted_from(self) -> float:
        """The time from which it may be deleted."""
        return min((entry.started_at for entry in self.deletes if not entry.is_refused), default=math.inf)

    def is_written_between(self, start: float, end: float) -> bool:
        """Return whether a write may have taken effect in this time."""
        return any(
            write.entry.started_at < end and write.entry.ended_at > start and not write.is_refused
            for write in self.writes
        )

    @property
    def effects(self) -> list[Entry]:
        """The calls that changed it, or may have."""
        return [
            *(write.entry for write in self.writes if not write.is_refused),
            *(entry for entry in self.deletes if not entry.is_refused),
        ]

    @property
    def last_effect_at(self) -> float:
        """The time after which no request changes it any more."""
        return max((entry.ended_at for entry in self.effects), default=-math.inf)


class _Family:
    """The children of a job."""

    def __init__(self) -> None:
        self.children: list[_Job] = []
        self.listings: list[_Listing] = []
        """Complete lists of them, the earliest first."""

    def listing_for(self, start: float, end: float) -> _Listing | None:
        """Return the list before or after `start`, if no child may have changed between it and this time.

        The nearest: for those further away, more time would have to be without a change.
        """
        number = bisect.bisect_right(self.listings, start, key=_began_at)
        for listing in self.listings[max(number - 1, 0) : number + 1]:
            if not self._may_change_between(min(start, _began_at(listing)), max(end, listing.pages[-1].ended_at)):
                return listing
        return None

    def _may_change_between(self, start: float, end: float) -> bool:
        starts, latest_ends = self._effects
        number = bisect.bisect_left(starts, end)
        return number > 0 and latest_ends[number - 1] > start

    @functools.cached_property
    def _effects(self) -> tuple[list[float], list[float]]:
        """When calls that may have changed a child began, in order, and the latest end of each and those before."""
        entries = sorted((entry for child in self.children for entry in child.effects), key=attrgetter("started_at"))
        ends = (entry.ended_at + LATE_SECONDS * (entry.response is None) for entry in entries)
        return [entry.started_at for entry in entries], list(itertools.accumulate(ends, max))

    def entries(self, listing: _Listing) -> list[Entry]:
        """Return a list of the children, and the calls that have changed them."""
        writes = [write.entry for child in self.children for write in child.writes]
        return [*listing.pages, *writes, *(delete for child in self.children for delete in child.deletes)]


def _began_at(listing: _Listing) -> float:
    return listing.pages[0].started_at


class _History:
    """A history, arranged by job."""

    def __init__(self, entries: Iterable[Entry], patience_seconds: float) -> None:
        self.patience_seconds = patience_seconds
        self.entries = sorted(entries, key=attrgetter("started_at"))
        self.of_job: dict[str, _Job] = {}
        self._models: dict[tuple[str, int], Job] = {}
        self._candidates: dict[bytes, list[_Job]] = {}
        self.streams = [entry for entry in self.entries if entry.method == "WatchJob"]
        self.jobs_streams = [entry for entry in self.entries if entry.method == "WatchJobs"]
        self.listings = _listings(self.entries)
        self.ended_at = max(
            (time for entry in self.entries for time in (entry.ended_at, entry.started_at) if time < math.inf),
            default=0.0,
        )
        for entry in self.entries:
            self._arrange(entry)
        self.families: dict[str, _Family] = defaultdict(_Family)
        """By the parent; also children that may never have been created."""
        for job in self.of_job.values():
            job.index()
            for parent_id in {write.request.job.parent_id for write in job.writes if _may_create(write)} - {""}:
                self.families[parent_id].children.append(job)
        for listing in self.listings:
            wanted = listing.pages[0].request.filter
            if listing.is_complete and wanted == pb.JobFilter(parent_id=wanted.parent_id):
                self.families[wanted.parent_id].listings.append(listing)

    @property
    def jobs(self) -> Iterable[_Job]:
        return self.of_job.values()

    def job(self, job_id: str) -> _Job:
        """Return what is known of a job, perhaps nothing."""
        if job_id not in self.of_job:
            self.of_job[job_id] = _Job(job_id)
        return self.of_job[job_id]

    def matches(self, wanted: JobFilter, job: Any) -> bool:
        """Return whether a job matches a filter."""
        model = self._models.get((job.id, job.revision))
        if model is None:  # one for each revision: its contents are equal, which another rule judges
            model = self._models[job.id, job.revision] = convert.job_from_wire(job)
        return wanted.matches(model)

    def candidates(self, request: Any) -> list[_Job]:
        """Return the jobs that match the filter of a list or a watch in the newest state that was received.

        Only these can be missing in it, and filters recur: comparing each list with all jobs would be quadratic.
        """
        key = request.filter.SerializeToString(deterministic=True)
        if key not in self._candidates:
            wanted = _filter_of(request)
            newest = [(job, {job.newest, job.newest_whole}) for job in self.jobs]
            self._candidates[key] = [
                job for job, seen in newest if any(self.matches(wanted, one.job) for one in seen if one is not None)
            ]
        return self._candidates[key]

    def _arrange(self, entry: Entry) -> None:
        request, response = entry.request, entry.response
        match entry.method:
            case "GetJob" | "CreateJob" | "UpdateJob" | "CancelJob":
                if response is not None:
                    self._see(response.job, entry, entry.ended_at, entry.started_at)
                if entry.method != "GetJob":
                    self._write(entry, request, response.job if response is not None else None, entry.is_refused)
            case "BatchUpdateJobs":
                for number, update in enumerate(request.updates):
                    result = response.results[number] if response is not None else None
                    job = result.job if result is not None and result.HasField("job") else None
                    if job is not None:
                        self._see(job, entry, entry.ended_at, entry.started_at, is_whole=False)
                    self._write(entry, update, job, entry.is_refused or (result is not None and job is None))
            case "DeleteJob":
                self.job(request.id).deletes.append(entry)
            case "ListJobs":
                for job in response.jobs if response is not None else ():
                    self._see(job, entry, entry.ended_at, entry.started_at)
            case "WatchJob":
                for number, (at, message) in enumerate(entry.responses):
                    since = -math.inf if number else entry.started_at
                    if message.event.type != pb.JOB_EVENT_TYPE_HEARTBEAT:
                        self._see(message.event.job, entry, at, since)
            case "WatchJobs":
                self._arrange_events(entry)
        if entry.code == "NOT_FOUND" and entry.method != "BatchUpdateJobs":
            self.job(request.id if "id" in request.DESCRIPTOR.fields_by_name else request.job.id).misses.append(entry)

    def _arrange_events(self, entry: Entry) -> None:
        is_snapshot = not entry.request.resume_token
        for at, message in entry.responses:
            for event in message.events:
                is_snapshot |= event.type == pb.JOB_EVENT_TYPE_RESET
                is_snapshot &= event.type != pb.JOB_EVENT_TYPE_SYNCED
                if event.job.state:  # a removal has only an id and a revision
                    is_read = is_snapshot and event.type == pb.JOB_EVENT_TYPE_SNAPSHOT
                    self._see(event.job, entry, at, entry.started_at if is_read else -math.inf)

    def _see(self, job: Any, entry: Entry, at: float, since: float, *, is_whole: bool = True) -> None:
        self.job(job.id).sightings.append(_Sighting(job, entry, at, since, is_whole))

    def _write(self, entry: Entry, request: Any, job: Any, is_refused: bool) -> None:
        job_id = request.id if isinstance(request, pb.CancelJobRequest) else request.job.id
        job_id = job_id or (job.id if job is not None else "")
        key = (type(request).__name__, request.request_id) if request.request_id else object()
        self.job(job_id).writes.append(_Write(entry, request, key, job, is_refused))


_Finding = tuple[Any, ...]
"""The id of a job or "", a text, and the entries that show it."""

_Rule = Callable[[_History], Iterator[_Finding]]


def acknowledged_writes_last(history: _History) -> Iterator[_Finding]:
    """A read returns no older state than one that any client had received before the read began."""
    for job in history.jobs:
        for sighting in job.sightings:
            known = job.newest_at(sighting.since)
            if known is not None and sighting.job.revision < known.job.revision:
                text = f"revision {sighting.job.revision} was read after revision {known.job.revision}"
                yield job.id, text, known.entry, sighting.entry
        for miss in job.misses:
            known = job.newest_at(miss.started_at)
            if known is not None and miss.ended_at < job.deleted_from:
                yield job.id, f"not found, after revision {known.job.revision} was received", known.entry, miss


def deleted_jobs_stay_deleted(history: _History) -> Iterator[_Finding]:
    """After a job was deleted, no call returns it."""
    for job in history.jobs:
        deleted = min((entry for entry in job.deletes if entry.code == "OK"), key=attrgetter("ended_at"), default=None)
        if deleted is None:
            continue
        for sighting in job.sightings:
            if sighting.since > deleted.ended_at:
                yield job.id, "returned after it was deleted", deleted, sighting.entry


def unknown_jobs_are_not_found(history: _History) -> Iterator[_Finding]:
    """A job that no call has created is NOT_FOUND."""
    for job in history.jobs:
        born = min((write.entry.started_at for write in job.writes if _may_create(write)), default=math.inf)
        for sighting in job.sightings:
            # A list or a watch may have jobs of before the history; a job that is read by its id is of the history.
            if sighting.at < born and (born < math.inf or (not job.writes and sighting.entry.method == "GetJob")):
                yield job.id, "returned, though no call had created it", sighting.entry


def _may_create(write: _Write) -> bool:
    return isinstance(write.request, pb.CreateJobRequest) or bool(getattr(write.request, "allow_missing", False))


def a_revision_has_one_content(history: _History) -> Iterator[_Finding]:
    """All responses with one revision of a job have the same job, and later revisions are not updated earlier."""
    for job in history.jobs:
        for sighting in job.sightings:
            first = job.by_revision.get(sighting.job.revision)
            if first not in (None, sighting) and _content(first.job, sighting) != _content(sighting.job, sighting):
                yield job.id, f"two contents of revision {sighting.job.revision}", first.entry, sighting.entry
        before: _Sighting | None = None
        for _, sighting in sorted(job.by_revision.items()):
            if before is not None and _nanoseconds(before.job) > _nanoseconds(sighting.job):
                text = f"updated_at of revision {sighting.job.revision} is before that of the one before"
                yield job.id, text, before.entry, sighting.entry
            before = sighting


def _content(job: Any, as_in: _Sighting) -> tuple[object, ...]:
    always = (job.state, job.attempt, job.progress, job.cancel_requested, job.stalled, _nanoseconds(job))
    return (*always, job.reason, sorted(job.labels.items())) if as_in.is_whole else always


def _nanoseconds(job: Any) -> int:
    nanoseconds: int = job.updated_at.ToNanoseconds()
    return nanoseconds


def writes_are_applied(history: _History) -> Iterator[_Finding]:
    """The response to a write has the values that were written, in a revision of its own."""
    for job in history.jobs:
        by_revision: dict[int, _Write] = {}
        for write in job.writes:
            if write.job is None or write.key in job.repeated_keys or not job.is_marked(write):
                continue
            is_batch = write.entry.method == "BatchUpdateJobs"
            if write.job.reason != write.mark and not (is_batch and not write.job.reason):
                yield job.id, f"the response to a write lacks its reason {write.mark!r}", write.entry
            other = by_revision.setdefault(write.job.revision, write)
            if other is not write:
                yield job.id, f"two writes made revision {write.job.revision}", other.entry, write.entry


def a_request_id_has_one_effect(history: _History) -> Iterator[_Finding]:
    """A request takes effect once, however often it is sent."""
    for job in history.jobs:
        ended: dict[str, _Sighting] = {}
        current = ""
        for _, sighting in sorted(job.by_revision.items()):
            mark = sighting.job.reason
            if mark != current and mark in ended and mark in job.own_marks:
                text = f"the write {mark!r} took effect again in revision {sighting.job.revision}"
                yield job.id, text, ended[mark].entry, *_between(job, ended[mark], sighting), sighting.entry
            current = mark
            ended[mark] = sighting


def _between(job: _Job, first: _Sighting, last: _Sighting) -> list[Entry]:
    """Return an entry with a revision between two others."""
    between = range(first.job.revision + 1, last.job.revision)
    return [job.by_revision[revision].entry for revision in between if revision in job.by_revision][:1]


def revisions_are_contiguous(history: _History) -> Iterator[_Finding]:
    """The revision increases by 1 with each change; what changes nothing, such as a heartbeat, does not raise it."""
    for job in history.jobs:
        newest = job.newest
        # A job with a heartbeat_timeout also changes when it stalls; without its creation, writes may be missing here.
        is_judged = not any(sighting.job.HasField("heartbeat_timeout") for sighting in job.sightings)
        if newest is None or not is_judged or not any(map(_may_create, job.writes)):
            continue
        effects: dict[object, int] = {}
        for write in job.writes:
            if not write.is_refused and not write.is_heartbeat:
                effects[write.key] = 2 if getattr(write.request, "allow_missing", False) else 1
        changes = sum(effects.values())
        end = job.end
        if end is not None and _corrects_the_end(end.job, newest.job):
            changes += newest.job.revision - end.job.revision
        if newest.job.revision > changes:
            yield job.id, f"revision {newest.job.revision} after at most {changes} changes", newest.entry


def a_revision_is_compared_and_set(history: _History) -> Iterator[_Finding]:
    """Of the writes that expect one revision, one succeeds, and makes the next revision."""
    for job in history.jobs:
        for write in job.writes:
            expected = getattr(write.request, "expected_revision", 0)
            if not expected or write.job is None or write.key in job.repeated_keys:
                continue
            if job.is_marked(write) and write.job.revision != expected + 1:
                text = f"a write that expected revision {expected} made {write.job.revision}"
                yield job.id, text, write.entry


def an_attempt_has_one_owner(history: _History) -> Iterator[_Finding]:
    """Of the claims of one attempt, one succeeds; a write of another attempt than the job's is refused."""
    for job in history.jobs:
        owners: dict[int, _Write] = {}
        for write in job.writes:
            attempt = getattr(write.request, "attempt", 0)
            if not attempt or write.job is None or write.key in job.repeated_keys:
                continue
            # The repeat of a job's end is accepted from any attempt, and changes nothing.
            has_effect = not write.job.done or (job.is_marked(write) and write.job.reason == write.mark)
            if has_effect and write.job.attempt != attempt:
                yield job.id, f"a write of attempt {attempt} changed attempt {write.job.attempt}", write.entry
            if write.request.job.state == pb.JOB_STATE_IN_PROGRESS and _writes_state(write.request):
                other = owners.setdefault(attempt, write)
                if other is not write:
                    yield job.id, f"two claims of attempt {attempt} succeeded", other.entry, write.entry


def _writes_state(request: Any) -> bool:
    return not request.HasField("update_mask") or "state" in request.update_mask.paths


def a_request_to_cancel_is_kept(history: _History) -> Iterator[_Finding]:
    """After CancelJob a job is done, or has cancel_requested, in this revision and in all later ones."""
    for job in history.jobs:
        first: _Sighting | None = None
        for revision, sighting in sorted(job.by_revision.items()):
            value = sighting.job
            if first is not None and not (value.cancel_requested or value.done):
                yield job.id, f"cancel_requested is gone in revision {revision}", first.entry, sighting.entry
                break
            if first is None and value.cancel_requested:
                first = sighting
        for write in job.writes:
            is_cancel = write.entry.method == "CancelJob" and write.job is not None
            if is_cancel and not (write.job.cancel_requested or write.job.done):
                yield job.id, "neither done nor cancel_requested in the response to CancelJob", write.entry


def a_done_job_never_changes(history: _History) -> Iterator[_Finding]:
    """After a final state there is no other revision, unless it corrects a finished_at that was in the future."""
    for job in history.jobs:
        end = job.end
        if end is None:
            continue
        for sighting in job.sightings:
            if sighting.job.revision > end.job.revision and not _corrects_the_end(end.job, sighting.job):
                text = f"revision {sighting.job.revision} after the end in {end.job.revision}"
                yield job.id, text, end.entry, sighting.entry


def _corrects_the_end(end: Any, later: Any) -> bool:
    """Return whether the server has only taken back the time of the end: its clock was ahead, and was set back."""
    is_earlier = later.finished_at.ToNanoseconds() < end.finished_at.ToNanoseconds()
    same = ("state", "attempt", "progress", "cancel_requested")
    return is_earlier and all(getattr(later, name) == getattr(end, name) for name in same)


def values_are_valid(history: _History) -> Iterator[_Finding]:
    """Progress is 0 to 100 and does not fall within an attempt; `done` and `finished_at` belong to final states."""
    for job in history.jobs:
        highest: dict[int, _Sighting] = {}
        for _, sighting in sorted(job.by_revision.items()):
            value = sighting.job
            if not 0 <= value.progress <= 100:
                yield job.id, f"progress {value.progress}", sighting.entry
            if not value.done == (value.state in DONE) == value.HasField("finished_at"):
                yield job.id, "`done`, `finished_at` and the state do not fit", sighting.entry
            best = highest.get(value.attempt)
            if best is not None and value.progress < best.job.progress:
                text = f"progress fell from {best.job.progress} to {value.progress} in one attempt"
                yield job.id, text, best.entry, sighting.entry
            else:
                highest[value.attempt] = sighting


def watches_rise(history: _History) -> Iterator[_Finding]:
    """A watch begins with a SNAPSHOT, each UPDATED has a higher revision, or of an open job other numbers of children,
    and a HEARTBEAT repeats the job sent last."""
    for entry in history.streams:
        last, numbers = 0, _NO_NUMBERS
        for number, (_, message) in enumerate(entry.responses):
            event = message.event
            if (number == 0) != (event.type == pb.JOB_EVENT_TYPE_SNAPSHOT):
                yield entry.request.id, f"message {number} of a watch is not of the right type", entry
                break
            is_heartbeat = event.type == pb.JOB_EVENT_TYPE_HEARTBEAT
            is_repeat = event.job.revision == last and _numbers_of(event.job) == numbers
            if event.job.revision < last or is_repeat != is_heartbeat:
                yield entry.request.id, f"a watch sent revision {event.job.revision} after {last}", entry
                break
            last, numbers = event.job.revision, _numbers_of(event.job)


_Numbers = tuple[Counter[str], float]
"""The number of children by state, and their mean progress."""

_NO_NUMBERS: _Numbers = (Counter(), 0.0)


def _numbers_of(job: Any) -> _Numbers:
    return Counter(dict(job.children)), job.children_progress


def _count(children: Sequence[Any]) -> _Numbers:
    words = {state: name.removeprefix("JOB_STATE_").lower() for name, state in pb.JobState.items()}
    progress = [100.0 if job.done else job.progress for job in children]
    return Counter(words[job.state] for job in children), sum(progress) / len(progress) if progress else 0.0


def _numbers_differ(one: _Numbers, other: _Numbers) -> bool:
    return one[0] != other[0] or abs(one[1] - other[1]) > LARGEST_ROUNDING_ERROR


def children_are_counted(history: _History) -> Iterator[_Finding]:
    """A job is read with the number of its children by state, and their mean progress."""
    for parent_id, family in history.families.items():
        for sighting in history.job(parent_id).sightings:
            if sighting.entry.method not in ("GetJob", "ListJobs"):
                continue
            listing = family.listing_for(sighting.since, sighting.at)
            if listing is not None and _numbers_differ(_numbers_of(sighting.job), _count(listing.jobs)):
                has = dict(sighting.job.children)
                text = f"read with the children {has} ({sighting.job.children_progress:g} %)"
                yield parent_id, f"{text}, not as they are listed", sighting.entry, *family.entries(listing)


def watches_end_with_the_job(history: _History) -> Iterator[_Finding]:
    """A watch ends with OK if and only if it has sent a final state, which is its last message."""
    for entry in history.streams:
        ends = [number for number, (_, message) in enumerate(entry.responses) if message.event.job.state in DONE]
        if entry.code == "OK" and not ends:
            yield entry.request.id, "a watch ended with OK without a final state", entry
        elif entry.code == "NOT_FOUND" and entry.responses:
            yield entry.request.id, "a watch ended with NOT_FOUND and without the final state", entry
        elif ends and ends[0] != len(entry.responses) - 1:
            yield entry.request.id, "a watch sent a message after the final state", entry
        elif ends and entry.reason:
            yield entry.request.id, f"a watch sent the final state and ended with {entry.reason}", entry


def watches_get_the_newest(history: _History) -> Iterator[_Finding]:
    """A watch sends each change, or a later one, in time, and ends after the job does."""
    for entry in history.streams:
        if entry.code:  # after an end by the server or the network, the client has to call again
            continue
        until = min(entry.ended_at, history.ended_at)
        interval = entry.request.min_update_interval
        patience = history.patience_seconds + interval.ToTimedelta().total_seconds()
        job = history.job(entry.request.id)
        known = job.newest_at(until - patience)
        if known is None or entry.started_at > until - patience:
            continue
        last = entry.responses[-1][1].event.job if entry.responses else None
        if last is None or last.revision < known.job.revision:
            text = f"a watch has not sent revision {known.job.revision}, {until - known.at:.1f} s old"
            yield job.id, text, known.entry, entry
        elif last.state in DONE and entry.responses[-1][0] < until - patience:
            yield job.id, "a watch has sent the final state and does not end", entry


@dataclass(slots=True)
class _Listing:
    """The pages of one list."""

    pages: list[Entry]

    @property
    def is_complete(self) -> bool:
        return self.pages[-1].response is not None and not self.pages[-1].response.next_page_token

    @property
    def jobs(self) -> list[Any]:
        return [job for page in self.pages if page.response is not None for job in page.response.jobs]


def _listings(entries: Sequence[Entry]) -> list[_Listing]:
    listings: list[_Listing] = []
    by_token: defaultdict[str, list[_Listing]] = defaultdict(list)
    """The lists that lack the page of a token. Lists that are read at once may have the same tokens."""
    for entry in entries:
        if entry.method != "ListJobs":
            continue
        page_token = entry.request.page_token
        if page_token and not by_token[page_token]:
            continue  # its first page is not in the history
        listing = by_token[page_token].pop(0) if page_token else _Listing([])
        listing.pages.append(entry)
        if len(listing.pages) == 1:
            listings.append(listing)
        if entry.response is not None and entry.response.next_page_token:
            by_token[entry.response.next_page_token].append(listing)
    return listings


def lists_are_complete(history: _History) -> Iterator[_Finding]:
    """The pages of a list have each job that matches throughout once, newest created first, and no other."""
    for listing in history.listings:
        first, last = listing.pages[0], listing.pages[-1]
        wanted = _filter_of(first.request)
        seen: set[str] = set()
        before = math.inf
        for job in listing.jobs:
            if job.id in seen:
                yield job.id, "twice in one list", *listing.pages
            if not history.matches(wanted, job):
                yield job.id, "in a list whose filter it does not match", *listing.pages
            created_at = job.created_at.ToNanoseconds()
            if created_at > before:
                yield job.id, "created later than the job before it in a list", *listing.pages
            seen.add(job.id)
            before = created_at
        for of_job in history.candidates(first.request) if listing.is_complete else ():
            known = of_job.newest_at(first.started_at)
            if of_job.id not in seen and known is not None and last.ended_at < of_job.deleted_from:
                later = [s for r, s in of_job.by_revision.items() if r >= known.job.revision]
                if all(history.matches(wanted, sighting.job) for sighting in (known, *later)):
                    yield of_job.id, "missing in a list", known.entry, *listing.pages


def histories_are_chains(history: _History) -> Iterator[_Finding]:
    """Each change of state and each claim is in the history, and begins in the state in which the one before ended."""
    for entry in history.entries:
        if entry.method != "ListJobTransitions" or entry.response is None:
            continue
        transitions = entry.response.transitions
        recorded = {transition.revision for transition in transitions}
        by_revision = history.job(entry.request.id).by_revision
        for revision, after in by_revision.items():
            before = by_revision.get(revision - 1)
            if before is None or revision in recorded or not recorded or not min(recorded) < revision < max(recorded):
                continue
            if (before.job.state, before.job.attempt) != (after.job.state, after.job.attempt):
                text = f"the history lacks the transition of revision {revision}"
                yield entry.request.id, text, before.entry, after.entry, entry
        for one, other in itertools.pairwise(transitions):
            if other.from_state != one.to_state or other.revision <= one.revision:
                yield entry.request.id, f"transitions {one.revision} and {other.revision} do not fit", entry


@dataclass(slots=True)
class _View:
    """What a client of WatchJobs knows: the newest state of each job that it holds, and what this is from."""

    jobs: dict[str, Any] = field(default_factory=dict)
    sources: tuple[Entry, ...] = ()
    is_synced: bool = False
    fault: tuple[str, str] | None = None
    """The id of a job and a text."""

    def apply(self, event: Any, is_match: Callable[[Any], bool]) -> None:
        """Take an event; `fault` says what is wrong with it."""
        job, held = event.job, self.jobs.get(event.job.id)
        match event.type:
            case pb.JOB_EVENT_TYPE_RESET:
                self.jobs, self.is_synced = {}, False
            case pb.JOB_EVENT_TYPE_SYNCED:
                self.is_synced = True
            case pb.JOB_EVENT_TYPE_SNAPSHOT | pb.JOB_EVENT_TYPE_UPDATED:
                # A final state is sent before the removal, also if the filter does not match it.
                if not is_match(job) and not job.done:
                    self.fault = job.id, "sent to a watch whose filter it does not match"
                if held is None or job.revision >= held.revision:
                    self.jobs[job.id] = job
            case pb.JOB_EVENT_TYPE_REMOVED:
                if held is not None and not job.state and not held.done:
                    self.fault = job.id, "removed without its final state"
                self.jobs.pop(job.id, None)


def watches_of_many_jobs_are_complete(history: _History) -> Iterator[_Finding]:
    """A client of WatchJobs that resumes by its tokens holds the jobs that match, each in its newest state."""
    used = {entry.request.resume_token for entry in history.jobs_streams} - {""}
    views: dict[str, _View] = {}
    for listing in history.listings:
        for page in listing.pages:
            token = page.response.resume_token if page.response is not None else ""
            if token in used and listing.is_complete:
                views[token] = _View({job.id: job for job in listing.jobs}, tuple(listing.pages))
    for entry in history.jobs_streams:
        token = entry.request.resume_token
        if token and token not in views:
            continue  # from before the history
        source = views.get(token, _View())
        view = _View(dict(source.jobs), (*source.sources, entry))
        wanted = _filter_of(entry.request)
        is_match = functools.partial(history.matches, wanted)
        for at, message in entry.responses:
            was_synced = view.is_synced
            for event in message.events:
                view.apply(event, is_match)
            if view.is_synced and not was_synced:
                yield from _lacks_at_synced(history, entry, view, wanted, at)
            if message.resume_token in used and message.resume_token != token:
                views[message.resume_token] = _View(dict(view.jobs), view.sources)
        if view.fault is not None:
            yield *view.fault, *view.sources
        if not entry.code:
            yield from _lacks(history, entry, view, wanted)


def _lacks_at_synced(history: _History, entry: Entry, view: _View, wanted: JobFilter, at: float) -> Iterator[_Finding]:
    """Compare a view at SYNCED with what clients had received before the stream began."""
    interval = entry.request.min_update_interval
    if not entry.request.HasField("min_update_interval") or interval.ToNanoseconds():
        return  # the newest change of a job may be held back
    for job in _concerned(history, entry, view):
        known, held = job.newest_at(entry.started_at), view.jobs.get(job.id)
        if known is None or (held is not None and held.revision >= known.job.revision):
            continue
        if job.is_written_between(entry.started_at, at):
            continue  # its newest change, which replaces the others, may come after SYNCED
        later = [sighting for revision, sighting in job.by_revision.items() if revision >= known.job.revision]
        are_matches = {history.matches(wanted, sighting.job) for sighting in (known, *later)}
        if are_matches == {True} and at < job.deleted_from:
            has = "nothing" if held is None else f"revision {held.revision}"
            text = f"a watch of many jobs has {has} of it at SYNCED, not revision {known.job.revision}"
            yield job.id, text, known.entry, *view.sources
        elif are_matches == {False} and held is not None:
            yield job.id, "a watch of many jobs still holds it at SYNCED", known.entry, *view.sources


def _concerned(history: _History, entry: Entry, view: _View) -> Iterable[_Job]:
    """Return the jobs that match in the end, and those that the client holds."""
    held = (history.job(job_id) for job_id in view.jobs)
    return {job.id: job for job in (*held, *history.candidates(entry.request))}.values()


def _lacks(history: _History, entry: Entry, view: _View, wanted: JobFilter) -> Iterator[_Finding]:
    """Compare a view at the end of a stream, which the client ended, with the jobs that have been quiet before it."""
    until = min(entry.ended_at, history.ended_at)
    settled = until - history.patience_seconds - entry.request.min_update_interval.ToTimedelta().total_seconds()
    if entry.started_at > settled:
        return
    if not view.is_synced:
        yield "", "a watch of many jobs sends no SYNCED", *view.sources
        return
    for job in _concerned(history, entry, view):
        newest, held = job.newest, view.jobs.get(job.id)
        if newest is None or job.last_effect_at > settled or newest.at > settled:
            continue
        shown = [newest.entry, *(delete for delete in job.deletes if not delete.is_refused), *view.sources]
        is_gone = any(delete.code == "OK" for delete in job.deletes)
        if is_gone or not history.matches(wanted, newest.job):
            if held is not None and (is_gone or not held.done or held.revision < newest.job.revision):
                yield job.id, "a watch of many jobs still holds it", *shown
        elif job.deleted_from == math.inf and (held is None or held.revision < newest.job.revision):
            has = "nothing" if held is None else f"revision {held.revision}"
            yield job.id, f"a watch of many jobs has {has} of it, not revision {newest.job.revision}", *shown
        elif held is not None and not held.done:
            listing = history.families[job.id].listing_for(settled, until)
            if listing is not None and _numbers_differ(_numbers_of(held), _count(listing.jobs)):
                text = f"a watch of many jobs has the children {dict(held.children)} of it, not as they are listed"
                yield job.id, text, *view.sources, *history.families[job.id].entries(listing)


def _filter_of(request: Any) -> JobFilter:
    return convert.filter_from_wire(request.filter, [])


RULES: Sequence[_Rule] = (
    acknowledged_writes_last,
    deleted_jobs_stay_deleted,
    unknown_jobs_are_not_found,
    a_revision_has_one_content,
    writes_are_applied,
    a_request_id_has_one_effect,
    revisions_are_contiguous,
    a_revision_is_compared_and_set,
    an_attempt_has_one_owner,
    a_request_to_cancel_is_kept,
    a_done_job_never_changes,
    values_are_valid,
    children_are_counted,
    watches_rise,
    watches_end_with_the_job,
    watches_get_the_newest,
    lists_are_complete,
    histories_are_chains,
    watches_of_many_jobs_are_complete,
)
