"""The watches that clients return."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import logging
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

import grpc
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.client import requests
from jobstatus_grpc.client.requests import JobChange, JobChangeType
from jobstatus_grpc.client.retry import Backoff, pause
from jobstatus_grpc.errors import DeadlineExceededError, InternalError, JobStatusError, UnavailableError
from jobstatus_grpc.job import Job, JobFilter
from jobstatus_grpc.wire import status


class Call(Protocol):
    """What is ended."""

    def cancel(self) -> object: ...


class AsyncSilenceTimer:
    """Cancels a call unless something is heard from it in time; `has_fired` tells. Ends with `cancel`."""

    def __init__(self, call: Call, seconds: float) -> None:
        self.has_fired = False
        self._call = call
        self._loop = asyncio.get_running_loop()
        self._due_at = self._loop.time() + seconds
        self._handle = self._loop.call_at(self._due_at, self._check)

    def heard(self, seconds: float) -> None:
        """Allow `seconds` of silence from now on."""
        self._due_at = self._loop.time() + seconds

    def cancel(self) -> None:
        """Stop watching over the call."""
        self._handle.cancel()

    def _check(self) -> None:
        # Moving the due time is all that a message costs; whether it has come is asked once it could have.
        if self._loop.time() < self._due_at:
            self._handle = self._loop.call_at(self._due_at, self._check)
        else:
            self.has_fired = True
            self._call.cancel()


class SilenceTimer:
    """As AsyncSilenceTimer, for the sync client; made by its Watchdog."""

    def __init__(self, call: Call, seconds: float, news: queue.SimpleQueue[SilenceTimer]) -> None:
        self.has_fired = False
        self.is_over = False
        self.due_at = time.monotonic() + seconds
        self._call = call
        self._news = news

    def heard(self, seconds: float) -> None:
        """Allow `seconds` of silence from now on."""
        self.due_at = time.monotonic() + seconds

    def cancel(self) -> None:
        """Stop watching over the call."""
        if not self.is_over:
            self.is_over = True
            self._news.put(self)

    def fire(self) -> None:
        """End the call."""
        self.is_over = self.has_fired = True
        self._call.cancel()


class Watchdog:
    """Fires the timers of all of a client's watches, in one thread that lives while there are any."""

    def __init__(self) -> None:
        # Timers end in finalizers too, which may run anywhere: SimpleQueue is the one lock-free way to a thread.
        self._news: queue.SimpleQueue[SilenceTimer] = queue.SimpleQueue()
        self._starting = threading.Lock()
        self._is_running = False

    def watch_over(self, call: Call, seconds: float) -> SilenceTimer:
        """Return a timer that cancels `call` after `seconds` of silence."""
        timer = SilenceTimer(call, seconds, self._news)
        with self._starting:
            self._news.put(timer)
            if not self._is_running:
                self._is_running = True
                threading.Thread(target=self._run, name="jobstatus-watchdog", daemon=True).start()
        return timer

    def _run(self) -> None:
        timers: set[SilenceTimer] = set()
        while True:
            due_at = min((timer.due_at for timer in timers), default=0.0)
            try:
                timer = self._news.get(timeout=max(due_at - time.monotonic(), 0.0))
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
            self._is_running = not self._news.empty()
            return not self._is_running


log = logging.getLogger("jobstatus_grpc.client")

DEFAULT_HEARTBEAT_INTERVAL_SECONDS = 30.0
"""The server's, where a watch names none."""

SHORTEST_HEARTBEAT_INTERVAL_SECONDS = 1.0

SILENT_HEARTBEATS = 3

LAST_TRY_SECONDS = 1.0

WARN_AFTER_ENDS = 3

_SURVIVED = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.CANCELLED,
}

Message = TypeVar("Message", contravariant=True)

News = TypeVar("News", covariant=True)


class Endurance(abc.ABC, Generic[Message, News]):
    """One watch, over as many streams as it takes."""

    is_over = False
    """Nothing more is to come, however the stream ends."""

    def __init__(
        self,
        subject: str,
        *,
        heartbeat_interval_seconds: float | None,
        give_up_seconds: float | None,
        warns: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take what is watched, for people, and the arguments of the clients' watches."""
        self._now = clock
        self._warning = logging.WARNING if warns else logging.DEBUG
        if heartbeat_interval_seconds is None and give_up_seconds is not None:
            third = max(give_up_seconds / SILENT_HEARTBEATS, SHORTEST_HEARTBEAT_INTERVAL_SECONDS)
            heartbeat_interval_seconds = min(third, DEFAULT_HEARTBEAT_INTERVAL_SECONDS)
        self._subject = subject
        self._heartbeat_interval_seconds = heartbeat_interval_seconds
        self._silence_seconds = SILENT_HEARTBEATS * (heartbeat_interval_seconds or DEFAULT_HEARTBEAT_INTERVAL_SECONDS)
        self._give_up_seconds = give_up_seconds
        self._heard_at = self._now()
        self._was_opened = False
        self._is_open = False
        self._backoff = Backoff()
        self._ends = 0

    @abc.abstractmethod
    def take(self, message: Message | None) -> News | None:
        """Return the first news in `message`, None: there is none; grpc.aio gives None for one that it could not parse.

        Raises:
            InternalError: the message makes no sense; the stream is to be ended with this.
        """

    def more(self) -> News | None:
        """Return what else is news in the message that was taken last; None: nothing."""
        return None

    def begin(self) -> float | None:
        """Begin a stream: return the deadline that its call gets, in seconds from now; None for none."""
        self._is_open = False
        return None

    @property
    def silence_seconds(self) -> float:
        """How long the stream may be silent from now on before it counts as dead."""
        if self._is_open or self._give_up_seconds is None:
            return self._silence_seconds
        return min(self._silence_seconds, max(self._left_seconds, LAST_TRY_SECONDS))

    def ended(self, error: grpc.RpcError | JobStatusError | None) -> float:
        """Return how long to wait before the next stream begins, after one that ended.

        Args:
            error: how it ended: the call's error, one of ours (InternalError for a message that makes no sense,
                UnavailableError for silence), or None for OK, although the watch is not over.

        Raises:
            JobStatusError: the watch is not to go on: the error is not one that passes, or patience is at its end.
        """
        cause = meaning_of(error)
        if cause is not None and not self._survives(error):
            raise cause from error
        pause = self._backoff.pause_seconds(cause)
        if self._give_up_seconds is not None:
            if self._left_seconds <= 0:
                heard = f"nothing was heard from the server for {self._give_up_seconds:g} s"
                raise UnavailableError(f"{heard}; last: {cause or 'the stream ended'}") from error
            pause = min(pause, self._left_seconds)
        self._log_end(cause, pause)
        return pause

    @property
    def _left_seconds(self) -> float:
        """How long until the watch gives up; endless without give_up_seconds."""
        give_up_seconds = float("inf") if self._give_up_seconds is None else self._give_up_seconds
        return self._heard_at + give_up_seconds - self._now()

    def _note_life(self) -> None:
        self._heard_at = self._now()
        if not self._is_open:
            self._is_open = self._was_opened = True
            self._backoff.reset()
            if self._ends >= WARN_AFTER_ENDS:
                log.log(self._warning, "the watch of %s goes on", self._subject)
            self._ends = 0

    def _survives(self, error: grpc.RpcError | JobStatusError | None) -> bool:
        if not isinstance(error, grpc.RpcError):
            return isinstance(error, (InternalError, UnavailableError))
        code = error.code()
        return code in _SURVIVED or (self._was_opened and code is grpc.StatusCode.RESOURCE_EXHAUSTED)

    def _log_end(self, cause: JobStatusError | None, pause: float) -> None:
        """Say once in each row of failures that something is wrong; a single end is everyday life."""
        self._ends += 1
        level = self._warning if self._ends == WARN_AFTER_ENDS else logging.DEBUG
        log.log(level, "the watch of %s was cut (%s); next try in %.1f s", self._subject, cause or "no reason", pause)


def meaning_of(error: grpc.RpcError | JobStatusError | None) -> JobStatusError | None:
    """Return the end of a stream as an error of our tree; None: it ended with OK."""
    return status.from_rpc_error(error) if isinstance(error, grpc.RpcError) else error


WAIT_UPDATE_INTERVAL_SECONDS = 60.0
"""Who only waits for the end need not hear of each step of progress."""

_WITH_A_JOB = {
    pb.JobEventType.JOB_EVENT_TYPE_SNAPSHOT,
    pb.JobEventType.JOB_EVENT_TYPE_UPDATED,
    pb.JobEventType.JOB_EVENT_TYPE_HEARTBEAT,
}


class Watching(Endurance[pb.WatchJobResponse, Job]):
    """One watch of one job. `is_over` once a done job was taken."""

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
        """Take the arguments of the clients' `watch`, and for `wait` when to raise DeadlineExceededError."""
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
        self._yielded: tuple[int, int, int] | None = None

    def begin(self) -> float | None:
        """As of any watch; a `wait` has a deadline."""
        super().begin()
        return None if self._deadline is None else max(self._deadline - self._now(), 0.0)

    def take(self, message: pb.WatchJobResponse | None) -> Job | None:
        """Return the job in `message` if it is news."""
        if message is None:
            raise InternalError("a message of the server cannot be read")
        event = message.event
        key = (event.job.created_at.seconds, event.job.created_at.nanos, event.job.revision)
        is_news = event.type in _WITH_A_JOB and event.HasField("job") and key != self._yielded
        job = requests.job_in(event) if is_news else None
        self._note_life()
        if job is not None:
            self._yielded = key
            self.is_over = job.done
        return job

    def ended(self, error: grpc.RpcError | JobStatusError | None) -> float:
        """As of any watch; the end of a `wait` past its deadline is DeadlineExceededError."""
        if self._deadline is None:
            return super().ended(error)
        # The core's clock may be a little ahead of ours.
        if self._now() >= self._deadline or isinstance(meaning_of(error), DeadlineExceededError):
            within = f"within {self._timeout_seconds:g} s"
            raise DeadlineExceededError(f"job {self.id!r} is not known to be done {within}") from error
        return min(super().ended(error), max(self._deadline - self._now(), 0.0))


RESET = JobChange(JobChangeType.RESET)


class JobsWatching(Endurance[pb.WatchJobsResponse, JobChange]):
    """One watch of many jobs. It is never over by itself.

    Of each job that matches it remembers what was returned last: events come at least once.
    """

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
        """Take the arguments of the clients' `watch_jobs`."""
        super().__init__(
            "many jobs",
            heartbeat_interval_seconds=heartbeat_interval_seconds,
            give_up_seconds=give_up_seconds,
            clock=clock,
        )
        self.resume_token = resume_token
        """Everything up to it has been returned."""
        self._request = requests.watch_jobs_request(
            filter, self._heartbeat_interval_seconds, min_update_interval_seconds
        )
        self._news: deque[JobChange] = deque()
        self._token_after_the_news = ""
        self._returned: dict[str, requests.Version] = {}
        self._knows_all = not resume_token
        """What is not in `_returned` is nothing that anybody was told of."""
        self._begins_anew = False

    @property
    def request(self) -> pb.WatchJobsRequest:
        """The request of a stream that goes on where the last one was."""
        request = pb.WatchJobsRequest(resume_token=self.resume_token)
        request.MergeFrom(self._request)
        return request

    def begin(self) -> float | None:
        """As of any watch. Without a token the snapshots begin anew, and tell nothing of jobs that have vanished."""
        self._begins_anew = not self.resume_token and bool(self._returned)
        return super().begin()

    def take(self, message: pb.WatchJobsResponse | None) -> JobChange | None:
        """Return the first event of `message` that is news."""
        events = requests.events_in(message)
        self._note_life()
        if self._begins_anew:
            self._begins_anew = False
            self._news.extend(self._reset())
        for change, version in events:
            self._news.extend(self._if_news(change, version))
        # An empty one comes while snapshots do: a token from before is still good then.
        self._token_after_the_news = message.resume_token if message is not None else ""
        return self.more()

    def more(self) -> JobChange | None:
        """Return the next event of that message that is news; the message's token counts once all were returned."""
        change = self._news.popleft() if self._news else None
        if not self._news and self._token_after_the_news:
            self.resume_token, self._token_after_the_news = self._token_after_the_news, ""
        return change

    def _if_news(self, change: JobChange, version: requests.Version) -> Iterator[JobChange]:
        if change.type is JobChangeType.RESET:
            yield from self._reset()
        elif change.type is JobChangeType.SYNCED:
            yield change
        elif change.type is JobChangeType.REMOVED:
            known = self._returned.get(change.id)
            if known is None:
                if not self._knows_all:
                    yield change
            elif version.is_after(known):
                del self._returned[change.id]
                yield change
        elif change.id not in self._returned or version.is_after(self._returned[change.id]):
            self._returned[change.id] = version
            yield change

    def _reset(self) -> Iterator[JobChange]:
        self._returned.clear()
        self._knows_all = True
        yield RESET


Item = TypeVar("Item")

SelfAsync = TypeVar("SelfAsync", bound="AsyncFollower[Any]")

SelfSync = TypeVar("SelfSync", bound="Follower[Any]")

AsyncStream: TypeAlias = "grpc.aio.UnaryStreamCall[Any, Any]"


class Stream(Protocol):
    """A call of the sync client that answers with a stream."""

    def __next__(self) -> Any: ...

    def cancel(self) -> object: ...


SILENT = "the server was silent for too long"

END_SECONDS = 1.0
"""How long a server may take to end a stream after the last news."""


class AsyncFollower(AsyncIterator[Item], Generic[Item]):
    """Follows streams for asyncio."""

    def __init__(self, endurance: Endurance[Any, Item], open_stream: Callable[[], AsyncStream]) -> None:
        self._endurance = endurance
        self._open_stream = open_stream
        self._open: tuple[AsyncStream, AsyncSilenceTimer] | None = None
        self._closing = asyncio.Event()
        self._error: JobStatusError | None = None

    async def __anext__(self) -> Item:
        while not self._closing.is_set() and not self._endurance.is_over:
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
        """End the watch and its stream at once. A task that waits for news meets the end of the iterator."""
        if self._open is not None and self._endurance.is_over:
            await _end_well(self._open[0])
        self._close()

    def abandon(self, error: JobStatusError) -> None:
        """As aclose, but who waits for news gets `error`."""
        self._error = error
        self._close()

    async def __aenter__(self: SelfAsync) -> SelfAsync:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        # `break` merely drops the iterator: without this its stream would live until the timer fires.
        with contextlib.suppress(RuntimeError):  # the event loop is closed
            self._drop_stream()

    def _close(self) -> None:
        self._closing.set()
        self._drop_stream()

    def _more(self) -> Item | None:
        """Return what else is news in the last message: while that is worked on, nobody listens for the next."""
        news = self._endurance.more()
        if news is not None and self._open is not None:
            self._open[1].heard(self._endurance.silence_seconds)
        return news

    async def _read(self) -> Item | None:
        """Return the first news in the next message, if any; after the end of a stream, wait until the next is due."""
        if self._open is None:
            stream = self._open_stream()
            self._open = stream, AsyncSilenceTimer(stream, self._endurance.silence_seconds)
        stream, timer = self._open
        cancels = _cancels_of_this_task()
        error: grpc.RpcError | JobStatusError | None = None
        try:
            message = await stream.read()
            if message is not grpc.aio.EOF:
                news = self._endurance.take(message)
                timer.heard(self._endurance.silence_seconds)
                return news
        except (grpc.RpcError, InternalError) as failure:
            error = failure
        except asyncio.CancelledError:
            if _cancels_of_this_task() > cancels or not (timer.has_fired or self._closing.is_set()):
                self._drop_stream()
                raise
            error = UnavailableError(SILENT)
        self._drop_stream()
        if not self._closing.is_set():
            await pause(self._endurance.ended(error), unless=self._closing)
        return None

    def _drop_stream(self) -> None:
        if self._open is not None:
            (stream, timer), self._open = self._open, None
            timer.cancel()
            stream.cancel()


async def _end_well(stream: AsyncStream) -> None:
    """Let the server end a stream that has told the end: if we cancelled, its log would speak of trouble."""
    reading = asyncio.ensure_future(stream.read())
    try:
        await asyncio.wait({reading}, timeout=END_SECONDS)
    finally:
        if not reading.cancel() and not reading.cancelled():
            reading.exception()  # asked for, or asyncio complains that nobody did


def _cancels_of_this_task() -> int:
    """Return how often the running task was asked to cancel itself; 0 before Python 3.11, which does not count."""
    if sys.version_info >= (3, 11):
        task = asyncio.current_task()
        return 0 if task is None else task.cancelling()
    return 0


class Follower(Iterator[Item], Generic[Item]):
    """Follows streams for the sync client."""

    def __init__(self, endurance: Endurance[Any, Item], open_stream: Callable[[], Stream], watchdog: Watchdog) -> None:
        self._endurance = endurance
        self._open_stream = open_stream
        self._watchdog = watchdog
        self._open: tuple[Stream, SilenceTimer] | None = None
        self._closing = threading.Event()
        self._error: JobStatusError | None = None

    def __next__(self) -> Item:
        while not self._closing.is_set() and not self._endurance.is_over:
            try:
                news = self._more() or self._read()
            except JobStatusError:
                self.close()
                raise
            if news is not None:
                return news
        self._end_well()
        self.close()
        error, self._error = self._error, None
        raise error or StopIteration

    def close(self) -> None:
        """End the watch and its stream at once. A thread that waits for news meets the end of the iterator."""
        self._closing.set()
        self._drop_stream()

    def abandon(self, error: JobStatusError) -> None:
        """As close, but who waits for news gets `error`."""
        self._error = error
        self.close()

    def __enter__(self: SelfSync) -> SelfSync:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_well()
        self.close()

    def __del__(self) -> None:
        self._drop_stream()

    def _more(self) -> Item | None:
        """As for the asyncio client."""
        news, opened = self._endurance.more(), self._open
        if news is not None and opened is not None:
            opened[1].heard(self._endurance.silence_seconds)
        return news

    def _read(self) -> Item | None:
        """Return the first news in the next message, if any; after the end of a stream, wait until the next is due."""
        if self._open is None:
            stream = self._open_stream()
            self._open = stream, self._watchdog.watch_over(stream, self._endurance.silence_seconds)
            if self._closing.is_set():  # by another thread that did not see this stream
                self._drop_stream()
                return None
        stream, timer = self._open
        error: grpc.RpcError | JobStatusError | None = None
        try:
            news = self._endurance.take(next(stream))
            timer.heard(self._endurance.silence_seconds)
            return news
        except StopIteration:
            pass
        except (grpc.RpcError, InternalError) as failure:
            error = UnavailableError(SILENT) if timer.has_fired else failure
        self._drop_stream()
        if not self._closing.is_set():
            self._closing.wait(self._endurance.ended(error))
        return None

    def _end_well(self) -> None:
        """As for the asyncio client."""
        if self._open is not None and self._endurance.is_over:
            stream, _ = self._open
            timer = self._watchdog.watch_over(stream, END_SECONDS)
            with contextlib.suppress(StopIteration, grpc.RpcError):
                next(stream)
            timer.cancel()

    def _drop_stream(self) -> None:
        opened, self._open = self._open, None
        if opened is not None:
            stream, timer = opened
            timer.cancel()
            stream.cancel()


class AsyncWatch(AsyncFollower[Job]):
    """An async iterator of a job's states; also a context manager. Ends after the done job, or with `aclose`.

    An `anext` that is cancelled loses nothing: the next one goes on.
    """


class Watch(Follower[Job]):
    """An iterator of a job's states; also a context manager. Ends after the done job, or with `close`."""


class AsyncJobsWatch(AsyncFollower[JobChange]):
    """An async iterator of what happens to many jobs; also a context manager. Ends with `aclose`, and not by itself.

    An `anext` that is cancelled loses nothing: the next one goes on.
    """

    def __init__(self, watching: JobsWatching, open_stream: Callable[[], AsyncStream]) -> None:
        super().__init__(watching, open_stream)
        self._watching = watching

    @property
    def resume_token(self) -> str:
        """The newest token up to which everything has been returned; "" before the first SYNCED.

        With the same filter, another watch goes on from here.
        """
        return self._watching.resume_token


class JobsWatch(Follower[JobChange]):
    """An iterator of what happens to many jobs; also a context manager. Ends with `close`, and not by itself."""

    def __init__(self, watching: JobsWatching, open_stream: Callable[[], Stream], watchdog: Watchdog) -> None:
        super().__init__(watching, open_stream, watchdog)
        self._watching = watching

    @property
    def resume_token(self) -> str:
        """As of the asyncio client."""
        return self._watching.resume_token
