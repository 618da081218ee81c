"""The watches that clients return: iterators that survive the end of their streams.

The state classes decide, without I/O: which messages are news, when to open the next stream, when to give up. The
iterators open streams, read them, and cancel those that are silent for too long.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any, ClassVar, Generic, Protocol, TypeAlias, TypeVar

import grpc
from google.protobuf import timestamp_pb2
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.client import requests
from jobstatus_grpc.client.fork import keep_for_ever, renew_in_children, renewed
from jobstatus_grpc.client.requests import JobChange, JobChangeType
from jobstatus_grpc.client.retry import Backoff, Liveness, ProxyRefusals, pause
from jobstatus_grpc.errors import (
    DeadlineExceededError,
    InternalError,
    InvalidTokenError,
    JobStatusError,
    TooManyRequestsError,
    UnavailableError,
)
from jobstatus_grpc.job import Job, JobFilter
from jobstatus_grpc.wire import convert, status

log = logging.getLogger("jobstatus_grpc.client")

DEFAULT_HEARTBEAT_INTERVAL_SECONDS = 30.0
"""The server's default."""

SHORTEST_HEARTBEAT_INTERVAL_SECONDS = 1.0
"""The server's limit."""

SILENT_HEARTBEATS = 3
"""Heartbeats that may be missing before a stream counts as dead: one or two are late under load."""

WAIT_UPDATE_INTERVAL_SECONDS = 60.0
"""For a watch that waits for a state: its changes are delivered at once, and progress rarely."""

LAST_TRY_SECONDS = 1.0
"""Time for the last stream before a watch gives up: enough to connect and read a snapshot."""

LASTING_SECONDS = 1.0
"""Time after its first message from which a stream works: with shorter ones, the pauses between streams grow."""

WARN_AFTER_ENDS = 3
"""Streams in a row that do not last before a warning is logged: one restart of a server takes two."""

WARN_AGAIN_SECONDS = 60.0
"""Time between warnings while streams do not last."""

END_SECONDS = 1.0
"""Limit of the server's time to end a stream after its last message."""

SILENT = "the server was silent for too long"

_SURVIVED_CODES = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.CANCELLED,
}

_EVENTS_WITH_JOB = {
    pb.JobEventType.JOB_EVENT_TYPE_SNAPSHOT,
    pb.JobEventType.JOB_EVENT_TYPE_UPDATED,
    pb.JobEventType.JOB_EVENT_TYPE_HEARTBEAT,
}

_UPDATED = pb.JobEventType.JOB_EVENT_TYPE_UPDATED

Message = TypeVar("Message", contravariant=True)

News = TypeVar("News", covariant=True)


class ResumableStream(abc.ABC, Generic[Message, News]):
    """The state of one watch over any number of streams."""

    METHOD: ClassVar[str]
    """The name of the RPC."""

    is_over = False
    """Nothing more is to be read, however the stream ends."""

    def __init__(
        self,
        subject: str,
        *,
        heartbeat_interval_seconds: float | None,
        give_up_seconds: float | None,
        warns: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin a watch.

        Args:
            subject: for the log: what is watched.
            heartbeat_interval_seconds: as of the clients' `watch`.
            give_up_seconds: as of the clients' `watch`.
            warns: log a row of failures as a warning; otherwise for debugging only.
            clock: in seconds.
        """
        self._now = clock
        if heartbeat_interval_seconds is None and give_up_seconds is not None:
            # A silent stream ends when half of the time is left, in which another connection is tried.
            sixth = max(give_up_seconds / (2 * SILENT_HEARTBEATS), SHORTEST_HEARTBEAT_INTERVAL_SECONDS)
            heartbeat_interval_seconds = min(sixth, DEFAULT_HEARTBEAT_INTERVAL_SECONDS)
        self._subject = subject
        self._heartbeat_interval_seconds = heartbeat_interval_seconds
        self._silence_seconds = SILENT_HEARTBEATS * (heartbeat_interval_seconds or DEFAULT_HEARTBEAT_INTERVAL_SECONDS)
        self._give_up_seconds = give_up_seconds
        self._warning_level = logging.WARNING if warns else logging.DEBUG
        self._progress_at = self._now()
        """When the watch last progressed: by news, or by a message of a stream that lasts."""
        self.begun_at = float("-inf")
        """When the stream was opened."""
        self._was_opened = False
        self._is_open = False
        self.renew_token: Callable[[], bool] = lambda: False
        """Makes the next stream look for a new token, and returns whether there may be one; set by the connection."""
        self.on_received: Callable[[str, int, str], None] | None = None
        """Called with id, revision and trace_parent of a job that has changed; set by the connection, for tracing."""
        self._opened_at = self._message_at = 0.0
        """When the stream's first and last message came."""
        self._backoff = Backoff()
        self._proxy_refusals = ProxyRefusals(clock)
        self._ends = 0
        self._is_warned = False
        self._warned_at = float("-inf")

    @property
    def is_connected(self) -> bool:
        """Whether the stream is open and has sent something."""
        return self._is_open

    def begin(self) -> float | None:
        """Begin a stream; return the deadline of its call in seconds, None: without."""
        self._is_open = False
        self.begun_at = self._now()
        return None

    @abc.abstractmethod
    def take(self, message: Message | None) -> News | None:
        """Return the first news in `message`, None: there is none. grpc.aio gives None for one it could not parse.

        Raises:
            InternalError: the message is not valid; call `ended` with this error.
        """

    def more(self) -> News | None:
        """Return the next news in the message that was taken last; None: there is none."""
        return None

    @property
    def silence_seconds(self) -> float:
        """How long the stream may be silent from now on before it counts as dead."""
        if self._is_open or self._give_up_seconds is None:
            return self._silence_seconds
        return min(self._silence_seconds, max(self._left_seconds, LAST_TRY_SECONDS))

    def ended(self, error: grpc.RpcError | JobStatusError | None) -> float:
        """Return how long to wait, after a stream that ended, before the next begins.

        Args:
            error: the call's error; InternalError for a message that is not valid; UnavailableError for silence; None
                for OK, which is no end of the watch.

        Raises:
            JobStatusError: the error is not transient, or give_up_seconds are over.
        """
        cause = _meaning_of(error)
        if cause is not None and not self._survives(error):
            raise cause from error
        if self._is_open and self._now() - self._opened_at >= LASTING_SECONDS:
            self._note_progress(self._message_at)
            self._backoff.reset()
            self._ends, self._warned_at = 0, float("-inf")
        # A stream that worked until now, and fell silent for longer than give_up_seconds, is tried once more.
        is_tried_again = self._is_open and self._message_at <= self._progress_at
        self._is_open = False
        pause = self._backoff.pause_seconds(cause)
        if self._give_up_seconds is not None:
            if self._left_seconds <= 0 and not is_tried_again:
                silence = f"nothing was heard from the server for {self._give_up_seconds:g} s"
                if self._message_at > self._progress_at:
                    silence = f"for {self._give_up_seconds:g} s streams ended before they brought anything new"
                raise UnavailableError(f"{silence}; last: {cause or 'the stream ended'}") from error
            pause = min(pause, max(self._left_seconds, 0.0))
        self._log_end(cause, pause)
        return pause

    def _log_end(self, cause: JobStatusError | None, pause_seconds: float) -> None:
        # A single end is normal: servers restart, proxies limit the age of connections.
        self._ends += 1
        level = logging.DEBUG
        if self._ends >= WARN_AFTER_ENDS and self._now() - self._warned_at >= WARN_AGAIN_SECONDS:
            level, self._is_warned, self._warned_at = self._warning_level, True, self._now()
        text = "the watch of %s was cut (%s); retrying in %.1f s"
        log.log(level, text, self._subject, cause or "no error", pause_seconds)

    def _survives(self, error: grpc.RpcError | JobStatusError | None) -> bool:
        if not isinstance(error, grpc.RpcError):
            return isinstance(error, (InternalError, UnavailableError))
        code = error.code()
        if code in _SURVIVED_CODES or (self._was_opened and code is grpc.StatusCode.RESOURCE_EXHAUSTED):
            return True
        if isinstance(_meaning_of(error), TooManyRequestsError):
            return True  # of all calls, and soon there is room; TOO_MANY_WATCHERS may last until another watch ends
        if self._is_open and code is grpc.StatusCode.UNAUTHENTICATED and self.renew_token():
            return True  # the token has expired; if the next one is refused too, before a message, the watch ends
        return self._proxy_refusals.is_outage(error)

    @property
    def _left_seconds(self) -> float:
        """How long until the watch gives up; infinite without give_up_seconds."""
        give_up_seconds = float("inf") if self._give_up_seconds is None else self._give_up_seconds
        return self._progress_at + give_up_seconds - self._now()

    def _note_message(self, *, is_news: bool) -> None:
        """Note a message. If it has no news, it is progress only on a stream that lasts."""
        self._message_at = self._now()
        self._proxy_refusals.service_answered()
        if not self._is_open:
            self._is_open = self._was_opened = True
            self._opened_at = self._message_at
        if is_news or self._message_at - self._opened_at >= LASTING_SECONDS:
            self._note_progress(self._message_at)

    def _note_progress(self, at: float) -> None:
        self._progress_at = max(self._progress_at, at)
        if self._is_warned:
            log.log(self._warning_level, "the watch of %s is resumed", self._subject)
            self._is_warned = False


def _meaning_of(error: grpc.RpcError | JobStatusError | None) -> JobStatusError | None:
    return status.from_rpc_error(error) if isinstance(error, grpc.RpcError) else error


class JobWatchState(ResumableStream[pb.WatchJobResponse, Job]):
    """The state of a watch of one job. `is_over` once a done job was taken."""

    METHOD = "WatchJob"

    def __init__(
        self,
        id: str,
        *,
        heartbeat_interval_seconds: float | None = None,
        min_update_interval_seconds: float | None = None,
        give_up_seconds: float | None = None,
        timeout_seconds: float | None = None,
        warns: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin a watch, with the arguments of the clients' `watch`.

        Args:
            timeout_seconds: for the clients' `wait`: raise DeadlineExceededError after this; None: never.
        """
        super().__init__(
            f"job {id}",
            heartbeat_interval_seconds=heartbeat_interval_seconds,
            give_up_seconds=give_up_seconds,
            warns=warns,
            clock=clock,
        )
        self.id = id
        self.request = requests.watch_request(id, self._heartbeat_interval_seconds, min_update_interval_seconds)
        self._timeout_seconds = timeout_seconds
        self._deadline = None if timeout_seconds is None else self._now() + timeout_seconds
        self._returned: requests.Version | None = None

    def begin(self) -> float | None:
        super().begin()
        return None if self._deadline is None else max(self._deadline - self._now(), 0.0)

    def take(self, message: pb.WatchJobResponse | None) -> Job | None:
        if message is None:
            raise InternalError("a message of the server cannot be parsed")
        event = message.event
        version = requests.Version.of(event.job)
        is_news = event.type in _EVENTS_WITH_JOB and event.HasField("job") and version != self._returned
        job = requests.job_in(event) if is_news else None
        self._note_message(is_news=is_news)
        if job is not None:
            if self.on_received is not None and event.type == _UPDATED and job.trace_parent:
                self.on_received(job.id, job.revision, job.trace_parent)
            self._returned = version
            self.is_over = job.done
        return job

    def ended(self, error: grpc.RpcError | JobStatusError | None) -> float:
        if self._deadline is None:
            return super().ended(error)
        # gRPC's clock may be a little ahead of ours. Much earlier, it is the deadline of a proxy.
        left = self._deadline - self._now()
        if left <= 0 or (left < LAST_TRY_SECONDS and isinstance(_meaning_of(error), DeadlineExceededError)):
            within = f"within {self._timeout_seconds:g} s"
            raise DeadlineExceededError(f"job {self.id!r} is not known to be done {within}") from error
        return min(super().ended(error), max(self._deadline - self._now(), 0.0))


RESET = JobChange(JobChangeType.RESET)

CUTS_BEFORE_PAGES = 2
"""Streams cut before SYNCED after which the jobs are listed in pages: one cut is a restart, two may be a size limit."""

LARGEST_WATCH_PAGE = 200
"""Jobs: a page stays far below the 1 MB at which proxies cut. If it is cut too, the next is half as large."""


class JobsWatchState(ResumableStream["pb.WatchJobsResponse | pb.ListJobsResponse", JobChange]):
    """The state of a watch of many jobs; `is_over` is never true.

    It keeps the version last returned of each job that matches, because events are delivered at least once.

    A stream that is cut before SYNCED begins anew. After CUTS_BEFORE_PAGES of them, the jobs are listed in pages, of
    which none is read twice, and the next stream begins with their token.
    """

    METHOD = "WatchJobs"

    def __init__(
        self,
        filter: JobFilter | None = None,
        *,
        resume_token: str = "",
        heartbeat_interval_seconds: float | None = None,
        min_update_interval_seconds: float | None = None,
        give_up_seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(
            "many jobs",
            heartbeat_interval_seconds=heartbeat_interval_seconds,
            give_up_seconds=give_up_seconds,
            clock=clock,
        )
        self.resume_token = resume_token
        """Everything up to it has been returned."""
        self._server_time: timestamp_pb2.Timestamp | None = None
        self._request = requests.watch_jobs_request(
            filter, self._heartbeat_interval_seconds, min_update_interval_seconds
        )
        self._news: deque[JobChange] = deque()
        self._token_after_news = ""
        self._returned: dict[str, requests.Version] = {}
        # With a resume_token, the caller may have jobs from an earlier watch that are not in `_returned`.
        self._has_all = not resume_token
        self._begins_anew = False
        self._is_synced = False
        self._cuts_before_synced = 0
        self._unsynced_events = self._most_unsynced_events = 0
        self._page_token: str | None = None
        """The next page to list; None: open a stream."""
        self._page_size = LARGEST_WATCH_PAGE
        self._is_page_taken = False
        self._token_of_pages = ""

    @property
    def server_time(self) -> datetime | None:
        """When the server sent the last message, by its clock; None: there was none yet."""
        return None if self._server_time is None else convert.instant_from_wire(self._server_time)

    @property
    def list_request(self) -> pb.ListJobsRequest | None:
        """The request of the page to read before the next stream; None: there is none."""
        if self._page_token is None:
            return None
        request = pb.ListJobsRequest(page_size=self._page_size, page_token=self._page_token)
        request.filter.CopyFrom(self._request.filter)
        return request

    @property
    def request(self) -> pb.WatchJobsRequest:
        """The request of a stream that resumes after the last one."""
        request = pb.WatchJobsRequest(resume_token=self.resume_token)
        request.MergeFrom(self._request)
        return request

    def begin(self) -> float | None:
        # Without a token the snapshots begin anew, and say nothing of jobs that were removed in between.
        self._begins_anew = not self.resume_token and bool(self._returned)
        self._is_synced = False
        self._unsynced_events = 0
        return super().begin()

    def ended(self, error: grpc.RpcError | JobStatusError | None) -> float:
        if self._is_page_taken:
            self._is_page_taken = False
            return 0.0
        if self._page_token is None:
            # The first message may be too long itself. With a token it is more likely that the server is away.
            if not self._is_synced and (self._is_open or not self.resume_token):
                self._cuts_before_synced += 1
                if self._cuts_before_synced >= CUTS_BEFORE_PAGES:
                    self._page_token, self._page_size = "", LARGEST_WATCH_PAGE
            return super().ended(error)
        if self._page_token and isinstance(_meaning_of(error), InvalidTokenError):
            self._page_token = ""
            return super().ended(UnavailableError("the list of jobs has changed"))
        self._page_size = max(self._page_size // 2, 1)
        return super().ended(error)

    def take(self, message: pb.WatchJobsResponse | pb.ListJobsResponse | None) -> JobChange | None:
        if isinstance(message, pb.ListJobsResponse):
            return self._take_page(message)
        if message is not None and message.HasField("server_time"):
            # A copy: the field itself would keep the whole message.
            self._server_time = timestamp_pb2.Timestamp.FromString(message.server_time.SerializeToString())
        changes = requests.changes_in(message)
        if self._begins_anew:
            self._begins_anew = False
            self._news.append(self._reset())
        news = [change for change, version in changes if self._is_news(change, version)]
        self._note_message(is_news=self._is_progress(changes, news))
        self._news.extend(news)
        if self.on_received is not None:
            for change in news:
                if change.type is JobChangeType.UPDATED and change.job is not None and change.job.trace_parent:
                    self.on_received(change.id, change.revision, change.job.trace_parent)
        # Without one, as between snapshots, the token before is still valid.
        self._token_after_news = message.resume_token if message is not None else ""
        return self.more()

    def _take_page(self, page: pb.ListJobsResponse) -> JobChange | None:
        events = [pb.JobEvent(type=pb.JobEventType.JOB_EVENT_TYPE_SNAPSHOT, job=job) for job in page.jobs]
        changes = requests.changes_in(pb.WatchJobsResponse(events=events))
        self._note_message(is_news=True)
        self._is_page_taken = True
        self._backoff.reset()
        self._page_size = min(2 * self._page_size, LARGEST_WATCH_PAGE)
        if not self._page_token:
            self._token_of_pages = page.resume_token
            if self._returned or self.resume_token:
                self._news.append(self._reset())
        self._news.extend(change for change, version in changes if self._is_news(change, version))
        self._page_token = page.next_page_token or None
        self._token_after_news = "" if self._page_token else self._token_of_pages
        if not self._page_token:
            self._cuts_before_synced = 0
        return self.more()

    def _is_progress(self, changes: Sequence[tuple[JobChange, requests.Version]], news: Sequence[JobChange]) -> bool:
        """Return whether the watch got farther than before: a stream that is cut before SYNCED repeats its events."""
        if not self._is_synced:
            self._unsynced_events += len(changes)
        if any(change.type is JobChangeType.SYNCED for change, _ in changes):
            self._is_synced = True
            self._cuts_before_synced = 0
        is_farther = self._unsynced_events > self._most_unsynced_events
        self._most_unsynced_events = max(self._unsynced_events, self._most_unsynced_events)
        return is_farther or any(change.type is JobChangeType.UPDATED for change in news)

    def more(self) -> JobChange | None:
        """Return the next news in the message that was taken last; its token is valid once all were returned."""
        change = self._news.popleft() if self._news else None
        if not self._news and self._token_after_news:
            self.resume_token, self._token_after_news = self._token_after_news, ""
        return change

    def _is_news(self, change: JobChange, version: requests.Version) -> bool:
        if change.type is JobChangeType.RESET:
            self._reset()
            return True
        if change.type is JobChangeType.SYNCED:
            return True
        returned = self._returned.get(change.id)
        if change.type is JobChangeType.REMOVED:
            if returned is None:
                return not self._has_all
            if version.is_after(returned):
                del self._returned[change.id]
                return True
            return False
        if returned is None or version.is_after(returned):
            self._returned[change.id] = version
            return True
        return False

    def _reset(self) -> JobChange:
        self._returned.clear()
        self._has_all = True
        return RESET


Item = TypeVar("Item")

SelfAsync = TypeVar("SelfAsync", bound="AsyncWatchIterator[Any]")

SelfSync = TypeVar("SelfSync", bound="WatchIterator[Any]")

AsyncStream: TypeAlias = "grpc.aio.UnaryStreamCall[Any, Any]"


class AsyncWatchIterator(AsyncIterator[Item], Generic[Item]):
    """Reads the streams of a watch, for asyncio."""

    def __init__(
        self, state: ResumableStream[Any, Item], open_stream: Callable[[], tuple[AsyncStream, Liveness]]
    ) -> None:
        self._state = state
        self._open_stream = open_stream
        self._open: tuple[AsyncStream, AsyncSilenceTimer] | None = None
        self._reading: asyncio.Task[Any] | None = None
        """Reads the next message. It outlives an `anext` that is cancelled: cancelling a read ends its stream."""
        self._reopen_at = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing = asyncio.Event()
        self._error: JobStatusError | None = None
        renew_in_children(self, AsyncWatchIterator._after_fork)

    @property
    def is_connected(self) -> bool:
        """Whether the server sends at the moment; False while it is away."""
        return self._state.is_connected

    async def __anext__(self) -> Item:
        self._enter_loop()
        while not self._closing.is_set() and not self._state.is_over:
            try:
                news = self._more() or await self._read()
            except JobStatusError:
                self._close()
                raise
            if news is not None:
                return news
        await self.aclose()
        error, self._error = self._error, None
        raise error or StopAsyncIteration

    async def aclose(self) -> None:
        """End the watch and its stream at once. In a task that waits for the next item, the iteration ends."""
        if self._open is not None and self._state.is_over:
            await _read_end(self._open[0])
        self._close()

    def abandon(self, error: JobStatusError) -> None:
        """End the watch and its stream at once; a task that waits for the next item gets `error`."""
        self._error = error
        if self._loop is None or self._loop is asyncio.get_running_loop():
            self._close()
        else:
            with contextlib.suppress(RuntimeError):  # that event loop is closed
                self._loop.call_soon_threadsafe(self._close)

    async def __aenter__(self: SelfAsync) -> SelfAsync:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        # `break` merely drops the iterator: without this its stream would be open until the timer fires.
        self._drop_stream()

    def _after_fork(self) -> None:
        keep_for_ever((self._open, self._reading))
        self._open = self._reading = None

    def _enter_loop(self) -> None:
        """Leave the stream of an event loop that is not the running one, as after another `asyncio.run`."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._drop_stream()
            is_closing, self._closing = self._closing.is_set(), asyncio.Event()
            if is_closing:
                self._closing.set()
            self._loop = loop

    def _close(self) -> None:
        self._closing.set()
        self._drop_stream()

    def _more(self) -> Item | None:
        """Return the next news in the last message; the time that the caller works on it is no silence."""
        news = self._state.more()
        if news is not None and self._open is not None:
            self._open[1].extend(self._state.silence_seconds)
        return news

    async def _read(self) -> Item | None:
        """Return the first news in the next message, if any; None also after the end of a stream."""
        if (pause_seconds := self._reopen_at - time.monotonic()) > 0:
            await pause(pause_seconds, unless=self._closing)
            return None
        if self._open is None:
            stream, liveness = self._open_stream()
            self._open = stream, AsyncSilenceTimer(stream, self._state.silence_seconds, liveness)
        stream, timer = self._open
        if self._reading is None:
            self._reading = asyncio.ensure_future(stream.read())
            self._reading.add_done_callback(_retrieve_exception)
        reading = self._reading
        await asyncio.wait({reading})
        if self._reading is not reading:
            return None  # closed, or taken by another task
        self._reading = None
        try:
            message = reading.result()
            if message is not grpc.aio.EOF:
                timer.received()
                news = self._state.take(message)
                timer.extend(self._state.silence_seconds)
                return news
            self._end_stream(None)
        except (grpc.RpcError, InternalError) as error:
            self._end_stream(without_traceback(error))
        except asyncio.CancelledError:
            self._end_stream(UnavailableError(SILENT))
        return None

    def _end_stream(self, error: grpc.RpcError | JobStatusError | None) -> None:
        self._drop_stream()
        self._reopen_at = time.monotonic() + self._state.ended(error)

    def _drop_stream(self) -> None:
        self._reading = None
        if self._open is not None:
            (stream, timer), self._open = self._open, None
            with contextlib.suppress(RuntimeError):  # the event loop is closed
                timer.cancel()
                stream.cancel()


async def _read_end(stream: AsyncStream) -> None:
    """Read the end of a stream after its last message: cancelling it would be logged as an error by the server."""
    reading = asyncio.ensure_future(stream.read())
    reading.add_done_callback(_retrieve_exception)
    try:
        await asyncio.wait({reading}, timeout=END_SECONDS)
    finally:
        reading.cancel()


def _retrieve_exception(task: asyncio.Task[Any]) -> None:
    """Retrieve the exception of a task, which asyncio logs otherwise if nothing reads the result."""
    if not task.cancelled():
        task.exception()


CallError = TypeVar("CallError", bound=BaseException)


def without_traceback(error: CallError) -> CallError:
    """Return `error` without its traceback, whose frames refer to the watch, and hold the error.

    In such a cycle, a watch that is dropped would keep its stream open until the garbage collector runs.
    """
    error.__traceback__ = None
    return error


class AsyncWatch(AsyncWatchIterator[Job]):
    """An async iterator of a job's states; also a context manager. Ends after the done job, or with `aclose`.

    An `anext` that is cancelled, as by `asyncio.wait_for`, loses nothing: the next one continues on the same stream.
    """


class AsyncJobsWatch(AsyncWatchIterator[JobChange]):
    """An async iterator of changes of many jobs; also a context manager. Ends with `aclose`, and not by itself.

    An `anext` that is cancelled, as by `asyncio.wait_for`, loses nothing: the next one continues on the same stream.
    """

    _state: JobsWatchState

    @property
    def resume_token(self) -> str:
        """The newest token up to which everything has been returned; "" before the first SYNCED.

        With the same filter, another watch resumes from here.
        """
        return self._state.resume_token

    @property
    def server_time(self) -> datetime | None:
        """When the server sent its last message, a heartbeat included, by its clock; None before the first."""
        return self._state.server_time


class AsyncPage:
    """A call of ListJobs as a stream of one message."""

    def __init__(self, call: grpc.aio.UnaryUnaryCall[Any, Any]) -> None:
        self._call = call
        self._is_read = False

    async def read(self) -> Any:
        """Return the page, then EOF."""
        if self._is_read:
            return grpc.aio.EOF
        page = await self._call
        self._is_read = True
        return page

    def cancel(self) -> bool:
        """End the call."""
        return self._call.cancel()


class Page:
    """As AsyncPage, for threads."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._is_read = False

    def __next__(self) -> Any:
        if self._is_read:
            raise StopIteration
        try:
            page = self._call.result()
        except grpc.FutureCancelledError:
            raise StopIteration from None
        self._is_read = True
        return page

    def cancel(self) -> object:
        """End the call."""
        return self._call.cancel()


class Stream(Protocol):
    """A call of the sync client with a stream of responses."""

    def __next__(self) -> Any: ...

    def cancel(self) -> object: ...


class WatchIterator(Iterator[Item], Generic[Item]):
    """Reads the streams of a watch, for threads: as AsyncWatchIterator, and `close` may be called by any thread."""

    def __init__(
        self, state: ResumableStream[Any, Item], open_stream: Callable[[], tuple[Stream, Liveness]], watchdog: Watchdog
    ) -> None:
        self._state = state
        self._open_stream = open_stream
        self._watchdog = watchdog
        self._open: tuple[Stream, SilenceTimer] | None = None
        self._reopen_at = 0.0
        self._closing = threading.Event()
        self._error: JobStatusError | None = None
        renew_in_children(self, WatchIterator._after_fork)

    @property
    def is_connected(self) -> bool:
        """Whether the server sends at the moment; False while it is away. Any thread may ask."""
        return self._state.is_connected

    def __next__(self) -> Item:
        while not self._closing.is_set() and not self._state.is_over:
            try:
                news = self._more() or self._read()
            except JobStatusError:
                self.close()
                raise
            if news is not None:
                return news
        self._read_end()
        self.close()
        error, self._error = self._error, None
        raise error or StopIteration

    def close(self) -> None:
        """End the watch and its stream at once. In a thread that waits for the next item, the iteration ends."""
        self._closing.set()
        self._drop_stream()

    def abandon(self, error: JobStatusError) -> None:
        """End the watch and its stream at once; a thread that waits for the next item gets `error`."""
        self._error = error
        self.close()

    def __enter__(self: SelfSync) -> SelfSync:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._read_end()
        self.close()

    def __del__(self) -> None:
        self._drop_stream()

    def _after_fork(self) -> None:
        keep_for_ever(self._open)
        self._open = None
        self._closing = renewed(self._closing)

    def _more(self) -> Item | None:
        news, opened = self._state.more(), self._open
        if news is not None and opened is not None:
            opened[1].extend(self._state.silence_seconds)
        return news

    def _read(self) -> Item | None:
        if (pause_seconds := self._reopen_at - time.monotonic()) > 0:
            self._closing.wait(pause_seconds)
            return None
        if self._open is None:
            stream, liveness = self._open_stream()
            self._open = stream, self._watchdog.watch_over(stream, self._state.silence_seconds, liveness)
            if self._closing.is_set():  # by another thread, which may not have seen this stream
                self._drop_stream()
                return None
        stream, timer = self._open
        try:
            message = next(stream)
            timer.received()
            news = self._state.take(message)
            timer.extend(self._state.silence_seconds)
            return news
        except StopIteration:
            self._end_stream(UnavailableError(SILENT) if timer.has_fired else None)
        except (grpc.RpcError, InternalError) as error:
            self._end_stream(UnavailableError(SILENT) if timer.has_fired else without_traceback(error))
        except BaseException:
            # A signal handler has raised. The read is still pending, and gRPC refuses a second one on its stream.
            self._drop_stream()
            raise
        return None

    def _end_stream(self, error: grpc.RpcError | JobStatusError | None) -> None:
        self._drop_stream()
        if not self._closing.is_set():
            self._reopen_at = time.monotonic() + self._state.ended(error)

    def _read_end(self) -> None:
        if self._open is not None and self._state.is_over:
            stream, _ = self._open
            timer = self._watchdog.watch_over(stream, END_SECONDS, Liveness())
            with contextlib.suppress(StopIteration, grpc.RpcError):
                next(stream)
            timer.cancel()

    def _drop_stream(self) -> None:
        opened, self._open = self._open, None
        if opened is not None:
            stream, timer = opened
            timer.cancel()
            stream.cancel()


class Watch(WatchIterator[Job]):
    """An iterator of a job's states; also a context manager. Ends after the done job, or with `close`."""


class JobsWatch(WatchIterator[JobChange]):
    """An iterator of changes of many jobs; also a context manager. Ends with `close`, and not by itself."""

    _state: JobsWatchState

    @property
    def resume_token(self) -> str:
        return self._state.resume_token

    resume_token.__doc__ = AsyncJobsWatch.resume_token.__doc__

    @property
    def server_time(self) -> datetime | None:
        return self._state.server_time

    server_time.__doc__ = AsyncJobsWatch.server_time.__doc__


class Cancellable(Protocol):
    """A call."""

    def cancel(self) -> object: ...


class AsyncSilenceTimer:
    """Cancels a call after `seconds` without `extend`; `has_fired` then. Notes the call with its connection."""

    def __init__(self, call: Cancellable, seconds: float, liveness: Liveness) -> None:
        self.has_fired = False
        self._call = call
        self._liveness = liveness
        self._loop = asyncio.get_running_loop()
        self._seconds = seconds
        self._due_at = self._loop.time() + seconds
        self._handle = self._loop.call_at(self._due_at, self._check)
        liveness.begin(self)

    def received(self) -> None:
        """Note a message."""
        self._liveness.received()

    def extend(self, seconds: float) -> None:
        """Allow `seconds` of silence from now on."""
        self._seconds = seconds
        self._due_at = self._loop.time() + seconds

    def cancel(self) -> None:
        """Stop the timer: the call has ended, or will now."""
        self._liveness.end(self)
        self._handle.cancel()

    def _check(self) -> None:
        # `extend` only moves `_due_at`: scheduling there would restart a timer that was cancelled during the read.
        if self._loop.time() < self._due_at:
            self._handle = self._loop.call_at(self._due_at, self._check)
        else:
            self.has_fired = True
            self._liveness.was_silent(self._seconds)
            self._call.cancel()


class SilenceTimer:
    """As AsyncSilenceTimer, for threads; made by a Watchdog."""

    def __init__(
        self, call: Cancellable, seconds: float, liveness: Liveness, changed: queue.SimpleQueue[SilenceTimer]
    ) -> None:
        self.has_fired = False
        self.is_over = False
        self.due_at = time.monotonic() + seconds
        self._call = call
        self._liveness = liveness
        self._seconds = seconds
        self._changed = changed
        liveness.begin(self)

    def received(self) -> None:
        """Note a message."""
        self._liveness.received()

    def extend(self, seconds: float) -> None:
        """Allow `seconds` of silence from now on."""
        self._seconds = seconds
        self.due_at = time.monotonic() + seconds

    def cancel(self) -> None:
        """Stop the timer: the call has ended, or will now."""
        self._liveness.end(self)
        if not self.is_over:
            self.is_over = True
            self._changed.put(self)

    def fire(self) -> None:
        """Cancel the call."""
        self.is_over = self.has_fired = True
        self._liveness.was_silent(self._seconds)
        self._call.cancel()


class Watchdog:
    """Fires the timers of all of a client's watches, in one thread that runs while there are any."""

    def __init__(self) -> None:
        self._begin()
        renew_in_children(self, Watchdog._begin)

    def _begin(self) -> None:
        # Timers are cancelled in finalizers too, which may run while any lock is held: SimpleQueue.put is reentrant.
        self._changed: queue.SimpleQueue[SilenceTimer] = queue.SimpleQueue()
        self._starting = threading.Lock()
        self._is_running = False

    def watch_over(self, call: Cancellable, seconds: float, liveness: Liveness) -> SilenceTimer:
        """Return a timer that cancels `call`, which is made on the connection of `liveness`, after `seconds`."""
        timer = SilenceTimer(call, seconds, liveness, self._changed)
        with self._starting:
            self._changed.put(timer)
            if not self._is_running:
                self._is_running = True
                threading.Thread(target=self._run, name="jobstatus-watchdog", daemon=True).start()
        return timer

    def _run(self) -> None:
        timers: set[SilenceTimer] = set()
        while True:
            due_at = min((timer.due_at for timer in timers), default=0.0)
            try:
                timer = self._changed.get(timeout=max(due_at - time.monotonic(), 0.0))
            except queue.Empty:
                if not timers and self._may_stop():
                    return
                for timer in [timer for timer in timers if timer.due_at <= time.monotonic()]:
                    timers.discard(timer)
                    timer.fire()
            else:
                if timer.is_over:
                    timers.discard(timer)
                else:
                    timers.add(timer)

    def _may_stop(self) -> bool:
        with self._starting:
            self._is_running = not self._changed.empty()
            return not self._is_running
