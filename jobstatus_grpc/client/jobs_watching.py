"""How the watch of many jobs goes on: which events are news, and from where to go on. No I/O."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator

from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.client.endurance import Endurance
from jobstatus_grpc.job_filter import JobFilter
from jobstatus_grpc.wire import changes
from jobstatus_grpc.wire.changes import JobChange, JobChangeType

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
        self._request = changes.watch_jobs_request(
            filter, self._heartbeat_interval_seconds, min_update_interval_seconds
        )
        self._news: deque[JobChange] = deque()
        self._token_after_the_news = ""
        self._returned: dict[str, changes.Version] = {}
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
        events = changes.events_in(message)
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

    def _if_news(self, change: JobChange, version: changes.Version) -> Iterator[JobChange]:
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
