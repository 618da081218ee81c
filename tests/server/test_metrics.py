"""The metrics and their values, without a server."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta, timezone

import grpc
import pytest
from prometheus_client import generate_latest
from prometheus_client.metrics_core import HistogramMetricFamily

from jobstatus_grpc.errors import TooManyRequestsError
from jobstatus_grpc.job import Create, Delete, JobState, Update
from jobstatus_grpc.server.held_bytes import HeldBytes, OpenCall
from jobstatus_grpc.server.metrics import GO_CODES, Histogram, Metrics
from jobstatus_grpc.server.services import SERVICES
from jobstatus_grpc.stores.interface import ChangeBatch
from jobstatus_grpc.stores.memory import MemoryStore

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)

# As google.golang.org/grpc/codes writes them.
CODES_OF_GO = {
    "OK", "Canceled", "Unknown", "InvalidArgument", "DeadlineExceeded", "NotFound", "AlreadyExists", "PermissionDenied",
    "ResourceExhausted", "FailedPrecondition", "Aborted", "OutOfRange", "Unimplemented", "Internal", "Unavailable",
    "DataLoss", "Unauthenticated",
}  # fmt: skip


class FullStore(MemoryStore):
    """Cannot write."""

    writable = False


def reader_of(metrics):
    """Return a function from a name and the values of labels to a metric's value."""
    samples = [sample for family in metrics.collect() for sample in family.samples]
    values = {(sample.name, *sample.labels.values()): sample.value for sample in samples}
    return lambda *key: values[key]


def buckets_of(histogram):
    family = HistogramMetricFamily("h", "", labels=())
    histogram.add_to(family)
    return {sample.labels.get("le", sample.name): sample.value for sample in family.samples}


def test_each_code_is_written_as_go_does():
    assert GO_CODES.keys() == {code.name for code in grpc.StatusCode}
    assert set(GO_CODES.values()) == CODES_OF_GO
    assert GO_CODES["DEADLINE_EXCEEDED"] == "DeadlineExceeded"


def test_a_histogram_counts_a_value_in_each_bucket_that_it_does_not_exceed():
    histogram = Histogram((1.0, 2.5))
    for value in (0.0, 1.0, 1.1, 2.5, 100.0):
        histogram.observe(value)
    assert buckets_of(histogram) == {"1.0": 2, "2.5": 4, "+Inf": 5, "h_count": 5, "h_sum": 104.6}


def test_every_series_of_every_method_is_there_before_the_first_call():
    metrics = Metrics(MemoryStore(), clock=lambda: NOW)
    value = reader_of(metrics)
    for method in (method for service in SERVICES for method in service.methods):
        labels = (
            "server_stream" if method.server_streaming else "unary",
            method.containing_service.full_name,
            method.name,
        )
        handled = {value("grpc_server_handled_total", *labels, code) for code in CODES_OF_GO}
        others = ("started_total", "msg_received_total", "msg_sent_total", "handling_seconds_count")
        assert handled | {value(f"grpc_server_{name}", *labels) for name in others} == {0}


def test_a_unary_call_has_sent_a_message_if_it_ended_well_and_a_stream_what_it_wrote():
    metrics = Metrics(MemoryStore(), clock=lambda: NOW)
    get, watch = metrics.calls["GetJob"], metrics.calls["WatchJob"]
    get.started, watch.started, watch.sent = 2, 3, 7
    get.end("OK", 0.002)
    get.end("NOT_FOUND", 0.002)
    watch.end("OK", 1.0)
    metrics.calls["WaitOperation"].started = 5
    value = reader_of(metrics)
    assert value("grpc_server_msg_sent_total", *get.labels) == 1
    assert value("grpc_server_msg_sent_total", *watch.labels) == 7
    assert value("grpc_server_handled_total", *get.labels, "NotFound") == 1
    assert [value("grpc_server_handling_seconds_bucket", *get.labels, le) for le in ("0.001", "0.0025")] == [0, 2]
    assert value("jobstatus_watchers", "job") == 2 + 5


def test_the_feed_lag_is_that_of_a_batchs_oldest_change():
    async def batch_of(metrics, store):
        position = await store.position()
        await store.commit([Create(id="a"), Create(id="b"), Update(id="a", changes={"state": JobState.SUCCEEDED})])
        await store.commit([Delete(id="a")])
        return await store.changes(position)

    store = MemoryStore(clock=lambda: NOW)
    metrics = Metrics(store, clock=lambda: NOW + timedelta(seconds=2))
    batch = asyncio.run(batch_of(metrics, store))
    metrics.observe_batch(batch)
    metrics.observe_batch(ChangeBatch("", [change for change in batch.changes if change.job is None]))
    value = reader_of(metrics)
    assert (value("jobstatus_feed_lag_seconds_count"), value("jobstatus_feed_lag_seconds_sum")) == (1, 2.0)


@pytest.mark.parametrize(("kind", "writable"), [(MemoryStore, 1), (FullStore, 0)])
def test_a_store_that_cannot_write_is_reported(kind, writable):
    assert reader_of(Metrics(kind(), clock=lambda: NOW))("jobstatus_store_writable") == writable


def test_the_limits_of_watchers_and_of_memory_are_reported():
    held = HeldBytes(1000)
    held.add(OpenCall("a", TooManyRequestsError), 10)
    value = reader_of(Metrics(MemoryStore(), clock=lambda: NOW, held=held, max_watchers=7))
    names = ("jobstatus_max_watchers", "jobstatus_held_bytes", "jobstatus_max_held_bytes")
    assert [value(name) for name in names] == [7, 10, 1000]


def test_the_number_of_jobs_says_how_to_combine_it():
    assert b"# HELP jobstatus_jobs Jobs in the store. Every server that shares the store" in generate_latest(
        Metrics(MemoryStore(), clock=lambda: NOW)
    )


def test_a_clock_that_went_back_makes_no_lag_negative():
    async def batch_of(store):
        position = await store.position()
        await store.commit([Create(id="a")])
        return await store.changes(position)

    metrics = Metrics(MemoryStore(), clock=lambda: NOW - timedelta(days=20_000))
    metrics.observe_batch(asyncio.run(batch_of(MemoryStore())))
    assert reader_of(metrics)("jobstatus_feed_lag_seconds_sum") == 0
    assert b"jobstatus_feed_lag_seconds_count 1.0\n" in generate_latest(metrics)
