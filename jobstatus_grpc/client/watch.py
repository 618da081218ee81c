"""The watches that clients return."""

from __future__ import annotations

from collections.abc import Callable

from jobstatus_grpc.client.follower import AsyncFollower, AsyncStream, Follower, Stream
from jobstatus_grpc.client.jobs_watching import JobsWatching
from jobstatus_grpc.client.silence import Watchdog
from jobstatus_grpc.record import Job
from jobstatus_grpc.wire.changes import JobChange


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
