"""The state of watches, by an injected clock: retries and giving up, what is new, where to resume."""

from __future__ import annotations

from typing import Any

import pytest
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc import JobChangeType
from jobstatus_grpc.client.watch import JobsWatchState, JobWatchState
from jobstatus_grpc.errors import DeadlineExceededError, InternalError, InvalidTokenError, UnavailableError
from tests.support.scripted_server import a_job, an_event, some_events

CUT = UnavailableError("cut")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr("random.uniform", lambda low, high: high)
    return Clock()


def message(revision: int = 1) -> pb.WatchJobResponse:
    return pb.WatchJobResponse.FromString(an_event(a_job(revision)))


def repeat(watching: Any, message: Any, clock: Clock) -> None:
    """Open streams that are cut after `message`, and pages that are cut before it."""
    for _ in range(100):
        watching.begin()
        if isinstance(watching, JobWatchState) or watching.list_request is None:
            watching.take(message)
        clock.now += watching.ended(CUT)


def test_pauses_grow_until_a_stream_lasts(clock):
    watching = JobWatchState("a", clock=clock)
    assert [watching.ended(CUT), watching.ended(None), watching.ended(CUT)] == [0.1, 0.2, 0.4]
    for revision, pause in ((1, 0.8), (2, 1.6), (2, 3.2)):
        watching.begin()
        watching.take(message(revision))
        assert watching.ended(CUT) == pause
    watching.begin()
    watching.take(message(2))
    clock.now += 1
    assert watching.ended(CUT) == 0.1


def test_streams_that_end_after_their_first_message_are_logged_once_a_minute(clock, caplog):
    watching = JobWatchState("a", clock=clock)
    began = clock.now
    while clock.now < began + 170:
        watching.begin()
        watching.take(message())
        clock.now += watching.ended(CUT)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 3
    assert all("was cut" in warning for warning in warnings)
    watching.begin()
    watching.take(message(2))
    assert caplog.records[-1].getMessage() == "the watch of job a is resumed"


def test_a_message_that_makes_no_sense_delivers_nothing(clock):
    watching = JobWatchState("a", clock=clock)
    watching.ended(CUT)
    with pytest.raises(InternalError):
        watching.take(None)
    assert watching.ended(InternalError()) == 0.2


def test_three_heartbeat_intervals_are_silence(clock):
    assert JobWatchState("a", clock=clock).silence_seconds == 90
    assert JobWatchState("a", heartbeat_interval_seconds=5, clock=clock).silence_seconds == 15


def test_a_watch_that_gives_up_soon_asks_for_heartbeats_that_are_soon_enough(clock):
    assert JobWatchState("a", give_up_seconds=12, clock=clock).request.heartbeat_interval.seconds == 2
    assert JobWatchState("a", give_up_seconds=1, clock=clock).request.heartbeat_interval.seconds == 1
    assert JobWatchState("a", give_up_seconds=3600, clock=clock).request.heartbeat_interval.seconds == 30


def test_a_quiet_stream_is_no_reason_to_give_up(clock):
    watching = JobWatchState("a", heartbeat_interval_seconds=30, give_up_seconds=10, clock=clock)
    watching.begin()
    assert watching.silence_seconds == 10
    watching.take(message())
    assert watching.silence_seconds == 90


def test_patience_begins_anew_with_news(clock):
    watching = JobWatchState("a", give_up_seconds=10, clock=clock)
    for revision, pause in enumerate((0.1, 0.2, 0.4, 0.8, 1.6), 1):
        clock.now += 8
        watching.begin()
        watching.take(message(revision))
        assert watching.ended(CUT) == pause
    clock.now += 9.95
    assert watching.ended(CUT) == pytest.approx(0.05)
    clock.now += 0.05
    with pytest.raises(UnavailableError, match="cut"):
        watching.ended(CUT)


def test_patience_begins_anew_with_a_message_of_a_stream_that_lasts(clock):
    watching = JobWatchState("a", give_up_seconds=10, clock=clock)
    watching.begin()
    watching.take(message())
    clock.now += 9
    watching.take(message())
    clock.now += 9
    assert watching.ended(CUT) == 0.1


def test_streams_that_bring_nothing_new_are_no_reason_for_patience(clock):
    watching = JobWatchState("a", give_up_seconds=10, clock=clock)
    with pytest.raises(UnavailableError, match="anything new"):
        repeat(watching, message(), clock)
    assert clock.now <= 1011


def test_without_give_up_a_watch_tries_for_ever(clock):
    watching = JobWatchState("a", clock=clock)
    for _ in range(1000):
        clock.now += watching.ended(CUT)
    assert watching.ended(CUT) == 10


def test_a_wait_ends_at_its_deadline_and_not_before(clock):
    watching = JobWatchState("a", timeout_seconds=0.25, clock=clock)
    assert watching.begin() == 0.25
    clock.now += watching.ended(CUT)
    clock.now += watching.ended(CUT)
    assert watching.begin() == 0
    with pytest.raises(DeadlineExceededError):
        watching.ended(CUT)


SYNCED = ("SYNCED", None)
RESET = ("RESET", None)


class Consumer:
    """Receives messages as the clients' watches do, and keeps the jobs as a caller would."""

    def __init__(self, resume_token: str = "") -> None:
        self.watching = JobsWatchState(resume_token=resume_token)
        self.watching.begin()

    def cut(self) -> Consumer:
        self.watching.ended(UnavailableError("cut"))
        self.watching.begin()
        return self

    def read(self, *events: tuple[str, pb.JobStatus | None], token: str = "") -> list[str]:
        """Return the new changes, as `UPDATED a 2`."""
        return self._take(pb.WatchJobsResponse.FromString(some_events(*events, token=token)))

    def read_page(self, page: pb.ListJobsResponse) -> list[str]:
        """Return the new changes of a page, and go on to the next."""
        news = self._take(page)
        assert self.watching.ended(None) == 0
        self.watching.begin()
        return news

    @property
    def next_page(self) -> str | None:
        request = self.watching.list_request
        return None if request is None else request.page_token

    def _take(self, message: pb.WatchJobsResponse | pb.ListJobsResponse) -> list[str]:
        change = self.watching.take(message)
        news = []
        while change is not None:
            news.append(f"{change.type.name} {change.id} {change.revision}".removesuffix("  0"))
            change = self.watching.more()
        return news

    @property
    def asks_for(self) -> str:
        return self.watching.request.resume_token


def job(id: str, revision: int, created: int = 1) -> pb.JobStatus:
    return a_job(revision, created=created, id=id)


def gone(id: str, revision: int) -> pb.JobStatus:
    return pb.JobStatus(id=id, revision=revision)


def synced_with(*jobs: pb.JobStatus, token: str = "t1") -> Consumer:
    consumer = Consumer()
    consumer.read(*(("SNAPSHOT", job) for job in jobs), SYNCED, token=token)
    return consumer


def test_a_watch_yields_snapshots_then_changes():
    consumer = Consumer()
    assert consumer.read(("SNAPSHOT", job("a", 1)), ("SNAPSHOT", job("b", 3))) == ["SNAPSHOT a 1", "SNAPSHOT b 3"]
    assert consumer.read(SYNCED, token="t1") == ["SYNCED"]
    assert consumer.read(("UPDATED", job("a", 2)), ("REMOVED", job("b", 4))) == ["UPDATED a 2", "REMOVED b 4"]


def test_a_change_is_not_yielded_twice():
    consumer = synced_with(job("a", 2), job("b", 1)).cut()
    assert consumer.read(("UPDATED", job("a", 2)), ("UPDATED", job("b", 2)), ("UPDATED", job("a", 1))) == [
        "UPDATED b 2"
    ]


def test_a_removed_job_that_matches_again_is_news():
    consumer = synced_with(job("a", 1))
    assert consumer.read(("REMOVED", job("a", 2)), ("UPDATED", job("a", 3))) == ["REMOVED a 2", "UPDATED a 3"]


def test_a_job_is_removed_once():
    consumer = synced_with(job("a", 1))
    assert consumer.read(("REMOVED", job("a", 2)), ("REMOVED", job("a", 3))) == ["REMOVED a 2"]


def test_a_deleted_job_is_removed_without_itself():
    consumer = synced_with(job("a", 4))
    change = consumer.watching.take(pb.WatchJobsResponse.FromString(some_events(("REMOVED", gone("a", 5)))))
    assert change is not None
    assert (change.type, change.id, change.revision, change.job) == (JobChangeType.REMOVED, "a", 5, None)


def test_a_job_made_anew_is_news():
    consumer = synced_with(job("a", 4))
    assert consumer.read(("UPDATED", job("a", 1, created=2))) == ["UPDATED a 1"]


def test_a_job_of_a_store_that_was_set_back_is_news_at_a_lower_revision_once_it_changes():
    consumer = synced_with(job("a", 4)).cut()
    changed = job("a", 3)
    changed.updated_at.seconds += 1
    assert consumer.read(("UPDATED", job("a", 3)), ("UPDATED", changed)) == ["UPDATED a 3"]
    assert consumer.read(("REMOVED", gone("a", 4))) == ["REMOVED a 4"]


def test_a_removal_from_before_is_none():
    consumer = synced_with(job("a", 4))
    assert consumer.read(("REMOVED", job("a", 3)), ("REMOVED", gone("a", 4))) == []


def test_the_removal_of_a_job_that_was_never_yielded_is_not_yielded():
    assert synced_with().read(("REMOVED", job("a", 3))) == []


def test_a_resuming_caller_may_hold_jobs_that_this_watch_does_not():
    consumer = Consumer("t0")
    assert consumer.read(("REMOVED", job("a", 3)), SYNCED, token="t1") == ["REMOVED a 3", "SYNCED"]
    assert consumer.read(RESET, ("REMOVED", job("a", 3))) == ["RESET"]


def test_after_a_reset_all_is_news():
    consumer = synced_with(job("a", 1))
    assert consumer.read(RESET, ("SNAPSHOT", job("a", 1)), SYNCED) == ["RESET", "SNAPSHOT a 1", "SYNCED"]


def test_a_token_counts_once_all_before_it_is_yielded():
    watching = JobsWatchState()
    events = [("SNAPSHOT", job("a", 1)), SYNCED]
    watching.take(pb.WatchJobsResponse.FromString(some_events(*events, token="t1")))
    assert watching.resume_token == ""
    watching.more()
    assert (watching.resume_token, watching.more()) == ("t1", None)


def test_a_message_without_news_has_a_token_too():
    consumer = synced_with(job("a", 1), token="t1")
    assert consumer.read(("HEARTBEAT", None), token="t2") == []
    assert consumer.read(("UPDATED", job("a", 1)), token="t3") == []
    assert consumer.asks_for == "t3"


def test_a_message_without_a_token_leaves_the_one_from_before():
    consumer = Consumer("t0")
    consumer.read(RESET, ("SNAPSHOT", job("a", 1)))
    assert consumer.asks_for == "t0"


def test_a_cut_before_the_first_token_begins_anew_with_a_reset():
    consumer = Consumer()
    consumer.read(("SNAPSHOT", job("a", 1)), ("SNAPSHOT", job("b", 1)))
    assert consumer.cut().read(("SNAPSHOT", job("a", 1)), SYNCED, token="t1") == ["RESET", "SNAPSHOT a 1", "SYNCED"]
    assert consumer.cut().read(("UPDATED", job("a", 2))) == ["UPDATED a 2"]


def a_page(*jobs: pb.JobStatus, next: str = "") -> pb.ListJobsResponse:
    return pb.ListJobsResponse(jobs=jobs, next_page_token=next, resume_token="t0")


def test_a_watch_that_is_cut_twice_before_it_is_synced_lists_the_jobs_in_pages():
    consumer = Consumer()
    consumer.read(("SNAPSHOT", job("a", 1)))
    assert consumer.cut().watching.list_request is None
    consumer.read(("SNAPSHOT", job("a", 1)))
    assert consumer.cut().next_page == ""
    assert consumer.read_page(a_page(job("b", 1), job("a", 1), next="p2")) == ["RESET", "SNAPSHOT b 1", "SNAPSHOT a 1"]
    assert consumer.next_page == "p2"
    assert consumer.cut().next_page == "p2"
    assert consumer.read_page(a_page(job("c", 1))) == ["SNAPSHOT c 1"]
    assert (consumer.watching.list_request, consumer.asks_for) == (None, "t0")
    assert consumer.read(("UPDATED", job("a", 1)), ("UPDATED", job("b", 2)), SYNCED) == ["UPDATED b 2", "SYNCED"]


def test_a_resumed_watch_that_is_cut_twice_before_it_is_synced_lists_the_jobs_too():
    consumer = synced_with(job("a", 1))
    for _ in range(2):
        consumer.cut().read(("UPDATED", job("b", 1)))
    consumer.cut()
    assert consumer.read_page(a_page(job("b", 1))) == ["RESET", "SNAPSHOT b 1"]


def test_a_resumed_watch_whose_server_is_away_keeps_its_place():
    consumer = synced_with(job("a", 1))
    for _ in range(5):
        consumer.cut()
    assert (consumer.watching.list_request, consumer.asks_for) == (None, "t1")


def test_a_page_that_is_cut_is_asked_for_again_with_half_its_size():
    consumer = Consumer()
    for _ in range(2):
        consumer.read(("SNAPSHOT", job("a", 1)))
        consumer.cut()
    sizes = []
    for _ in range(10):
        request = consumer.watching.list_request
        sizes.append(request and request.page_size)
        consumer.cut()
    assert sizes == [200, 100, 50, 25, 12, 6, 3, 1, 1, 1]
    consumer.read_page(a_page(job("a", 1), next="p2"))
    request = consumer.watching.list_request
    assert request is not None
    assert request.page_size == 2


def test_a_list_whose_token_is_no_longer_valid_begins_anew():
    consumer = Consumer()
    for _ in range(2):
        consumer.read(("SNAPSHOT", job("a", 1)))
        consumer.cut()
    consumer.read_page(a_page(job("a", 1), next="p2"))
    consumer.watching.ended(InvalidTokenError())
    assert consumer.next_page == ""
    assert consumer.read_page(a_page(job("a", 1))) == ["RESET", "SNAPSHOT a 1"]


def test_a_first_listing_that_gets_no_farther_is_no_reason_for_patience(clock):
    watching = JobsWatchState(give_up_seconds=10, clock=clock)
    snapshot = pb.WatchJobsResponse.FromString(some_events(("SNAPSHOT", job("a", 1))))
    with pytest.raises(UnavailableError):
        repeat(watching, snapshot, clock)
    assert clock.now <= 1011


def test_a_cut_before_anything_was_yielded_needs_no_reset():
    assert Consumer().cut().read(("SNAPSHOT", job("a", 1))) == ["SNAPSHOT a 1"]


def test_kinds_from_the_future_are_passed_over():
    message = pb.WatchJobsResponse(resume_token="t1")
    message.events.add(type=99, job=job("a", 1))
    watching = JobsWatchState()
    assert (watching.take(message), watching.resume_token) == (None, "t1")


@pytest.mark.parametrize(
    "event",
    [("UPDATED", None), ("UPDATED", gone("a", 1)), ("SNAPSHOT", job("", 1)), ("UPDATED", job("a", 1, created=2**60))],
    ids=["no job", "no creation", "no id", "no such time"],
)
def test_a_message_that_makes_no_sense_yields_nothing(event):
    consumer = synced_with(token="t1")
    with pytest.raises(InternalError):
        consumer.read(("UPDATED", job("b", 1)), event, token="t2")
    assert (consumer.asks_for, consumer.watching.more()) == ("t1", None)


def test_a_message_that_cannot_be_read_is_an_internal_error():
    with pytest.raises(InternalError):
        JobsWatchState().take(None)
