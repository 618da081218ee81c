"""How watches of many jobs end, how many there may be, and what their readers cost."""

from __future__ import annotations

import signal
import time

import psutil
import pytest
from google.protobuf import duration_pb2
from jobstatus.v1 import job_status_pb2 as pb

from tests.reader import Reader, told
from tests.server.admission import admitted_within_a_second

NONE = duration_pb2.Duration()
MIB = 1024 * 1024
LARGE = {"text": "x" * 60_000}


def open_watch(service, **fields):
    return service.stub.WatchJobs(pb.WatchJobsRequest(min_update_interval=NONE, **fields), timeout=30)


def test_watches_of_many_and_of_one_count_together(serve, refused, new_id):
    service = serve("--max-watchers", "2")
    job = service.create(id=new_id())
    streams = [open_watch(service), service.watch(job.id)]
    for stream in streams:
        next(stream)
    for watch in (lambda: list(open_watch(service)), lambda: list(service.watch(job.id))):
        assert refused(watch).kind == ("RESOURCE_EXHAUSTED", "TOO_MANY_WATCHERS")
    for stream in streams:
        stream.cancel()
    admitted_within_a_second(lambda: open_watch(service)).cancel()


@pytest.mark.parametrize("moment", ["amid snapshots", "synced", "waiting"])
@pytest.mark.parametrize("how", ["cancel", "close"])
def test_a_watch_whose_client_has_gone_is_free_within_a_second(serve, new_id, moment, how):
    service = serve("--max-watchers", "1")
    for _ in range(300 if moment == "amid snapshots" else 1):
        service.create(id=new_id(), result=LARGE)
    leaver = type(service)(service.address)
    stream = open_watch(leaver)
    next(stream)
    if moment == "waiting":
        next(stream)
    if how == "cancel":
        stream.cancel()
    else:
        leaver.close()
    admitted_within_a_second(lambda: open_watch(service)).cancel()
    leaver.close()


def test_a_drain_ends_watches_and_says_to_call_again(serve, refused, new_id):
    service = serve()
    streams = [open_watch(service) for _ in range(3)]
    for stream in streams:
        next(stream)
    service.process.signal(signal.SIGTERM)
    for stream in streams:
        refusal = refused(lambda stream=stream: list(stream))
        assert refusal.kind == ("UNAVAILABLE", "DRAINING")
        assert refusal.retry_seconds > 0
    assert service.process.wait() == 0


def test_a_watch_ends_at_its_age_also_where_jobs_never_rest(serve, refused, new_id):
    service = serve("--max-connection-age", "1s")
    job = service.create(id=new_id())
    started = time.monotonic()
    stream = open_watch(service)
    reader = Reader()

    def read():
        for number, message in enumerate(stream):
            reader.take(message)
            service.update(job.id, labels={"n": str(number)})

    refusal = refused(read)
    assert refusal.kind == ("UNAVAILABLE", "STREAM_AGE")
    assert refusal.retry_seconds > 0
    assert time.monotonic() - started > 0.8
    assert len(reader.jobs) == 1


def test_a_watch_goes_on_where_it_was_after_its_server_was_restarted(serve, new_id, tmp_path):
    service = serve(store=f"sqlite:///{tmp_path}/jobs.db")
    jobs = [service.job_in("IN_PROGRESS", id=new_id()) for _ in range(3)]
    reader = Reader()
    stream = service.stub.WatchJobs(reader.begin())
    while not reader.is_synced:
        reader.take(next(stream))
    service.update(jobs[0].id, state="JOB_STATE_SUCCEEDED")
    service.process.restart()
    service = type(service)(service.process.address)
    service.update(jobs[1].id, progress=5)
    stream = service.stub.WatchJobs(reader.begin())
    messages = []
    while not reader.is_synced:
        messages.append(next(stream))
        reader.take(messages[-1])
    assert reader.resets == 0
    assert jobs[2].id not in [job_id for message in messages for _, job_id in told(message)]
    assert reader.jobs == {job.id: service.get(job.id) for job in jobs}
    service.close()


def test_a_token_of_a_store_that_is_gone_leads_to_reset_and_snapshots(serve, new_id):
    service = serve()
    service.create(id=new_id())
    reader = Reader()
    stream = service.stub.WatchJobs(reader.begin())
    while not reader.is_synced:
        reader.take(next(stream))
    service.process.restart()
    service = type(service)(service.process.address)
    job = service.create(id=new_id())
    stream = service.stub.WatchJobs(reader.begin())
    while not reader.is_synced:
        reader.take(next(stream))
    assert reader.resets == 1
    assert reader.jobs == {job.id: job}
    service.close()


def memory(service):
    return psutil.Process(service.process.pid).memory_info().rss


def test_readers_that_do_not_read_cost_the_newest_change_of_each_job_only(serve, new_id):
    service = serve()
    jobs = [service.job_in("IN_PROGRESS", id=new_id(), result=LARGE) for _ in range(5)]
    idle = [open_watch(type(service)(service.address)) for _ in range(20)]
    for stream in idle:
        next(stream)
    keen = open_watch(service)
    reader = Reader()
    while not reader.is_synced:
        reader.take(next(keen))
    before = memory(service)
    for number in range(200):
        job = service.update(jobs[number % 5].id, labels={"n": str(number)})
        while reader.jobs[job.id] != job:
            reader.take(next(keen))
    assert memory(service) - before < 60 * MIB
    for stream in (*idle, keen):
        stream.cancel()


def test_a_reader_that_reads_again_gets_the_newest_of_every_job(serve, new_id):
    service = serve()
    jobs = [service.job_in("IN_PROGRESS", id=new_id(), result=LARGE) for _ in range(5)]
    stream = open_watch(service)
    reader = Reader()
    while not reader.is_synced:
        reader.take(next(stream))
    for number in range(600):
        last = service.update(jobs[number % 5].id, labels={"n": str(number)})
    count = 0
    while reader.jobs[last.id] != last:
        reader.take(next(stream))
        count += 1
    assert count < 400
    assert reader.jobs == {job.id: service.get(job.id) for job in jobs}
    stream.cancel()
