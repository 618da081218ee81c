"""The server's spans, exported to memory."""

from __future__ import annotations

import asyncio
import functools
import json
import sys
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from jobstatus.v1 import job_status_pb2 as pb
from opentelemetry import trace
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased, TraceIdRatioBased

from jobstatus_grpc.errors import CannotStartError
from jobstatus_grpc.job.model import BLANK
from jobstatus_grpc.server import tracing
from jobstatus_grpc.server.app import _open_tracing
from jobstatus_grpc.server.logs import RequestLog
from jobstatus_grpc.server.tracing import ServerTracing
from jobstatus_grpc.stores.memory import MemoryStore
from tests.support.auth import TRANSPORTS
from tests.support.paused_store import PausedStore
from tests.support.servers import serving

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{SPAN}-01"
SAMPLED = (("traceparent", PARENT), ("tracestate", "vendor=1"))
UNSAMPLED = (("traceparent", f"00-{TRACE}-{SPAN}-00"),)
HEARTBEAT_TRACE = (("traceparent", f"00-{SPAN}{SPAN}-{SPAN}-01"),)
SERVICE = "jobstatus.v1.JobStatusService"


class Started(SpanProcessor):
    """Counts the spans that have started, by their names."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.more = asyncio.Event()

    def on_start(self, span, parent_context=None) -> None:
        self.counts[span.name] += 1
        self.more.set()


class Exported:
    """A ServerTracing, and the spans that it made."""

    def __init__(self, sampler=None) -> None:
        self._exporter = InMemorySpanExporter()
        self._started = Started()
        provider = TracerProvider(sampler=sampler)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        provider.add_span_processor(self._started)
        self.tracing = ServerTracing(provider)

    async def until_started(self, name: str, count: int) -> None:
        """Wait until `count` spans of this name have started."""
        while self._started.counts[name] < count:
            self._started.more.clear()
            await self._started.more.wait()

    def spans(self, name: str) -> list[Any]:
        return [span for span in self._exporter.get_finished_spans() if span.name in (name, f"{SERVICE}/{name}")]

    def span(self, name: str) -> Any:
        (span,) = self.spans(name)
        return span


def in_loop(test):
    @functools.wraps(test)
    def run(*args, **kwargs):
        asyncio.run(test(*args, **kwargs))

    return run


def create(stub, job_id, metadata=(), **fields):
    return stub.CreateJob(pb.CreateJobRequest(job=pb.JobStatus(id=job_id, **fields)), metadata=metadata)


def update(stub, job_id, progress, metadata=SAMPLED, mask=None):
    request = pb.UpdateJobRequest(job=pb.JobStatus(id=job_id, progress=progress))
    if mask is not None:
        request.update_mask.CopyFrom(FieldMask(paths=mask))
    return stub.UpdateJob(request, metadata=metadata)


@pytest.mark.parametrize("transport", TRANSPORTS)
@in_loop
async def test_a_call_is_a_span_in_the_callers_trace(transport):
    exported = Exported()
    async with serving(MemoryStore(), tracing=exported.tracing, transport=transport) as stub:
        await create(stub, "a", SAMPLED)
    span = exported.span("CreateJob")
    assert span.kind is trace.SpanKind.SERVER
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, SPAN)
    assert span.context.trace_state.to_header() == "vendor=1"
    assert span.attributes["network.peer.address"].startswith("ipv4:127.0.0.1")
    assert {**span.attributes, "network.peer.address": ""} == {
        "rpc.system": "grpc",
        "rpc.service": SERVICE,
        "rpc.method": "CreateJob",
        "rpc.grpc.status_code": 0,
        "jobstatus.job.id": "a",
        "network.peer.address": "",
    }


@in_loop
async def test_a_refusal_is_in_its_span_and_no_error_of_the_server():
    exported = Exported()
    async with serving(MemoryStore(), tracing=exported.tracing) as stub:
        with pytest.raises(grpc.RpcError):
            await update(stub, "unknown", 1)
    span = exported.span("UpdateJob")
    assert span.attributes["rpc.grpc.status_code"] == 5
    assert span.attributes["error.type"] == "JOB_NOT_FOUND"
    assert span.status.status_code is trace.StatusCode.UNSET


@in_loop
async def test_one_write_of_the_store_links_to_all_updates_that_it_commits():
    exported, store = Exported(), PausedStore()
    async with serving(store, tracing=exported.tracing) as stub:
        for job_id in "ab":
            await create(stub, job_id, UNSAMPLED)
        batch = pb.BatchUpdateJobsRequest(
            updates=[pb.UpdateJobRequest(job=pb.JobStatus(id=job_id, progress=1)) for job_id in "ab"]
        )
        first_commit = store.stop_at("commit")
        first = asyncio.ensure_future(update(stub, "a", 1))
        await first_commit.reached.wait()
        others = [asyncio.ensure_future(stub.BatchUpdateJobs(batch, metadata=SAMPLED))]
        others += [asyncio.ensure_future(update(stub, "a", 2)) for _ in range(20)]
        await exported.until_started("jobstatus commit", 22)
        first_commit.go_on.set()
        await asyncio.gather(first, *others)
    calls = {span.context.span_id for name in ("UpdateJob", "BatchUpdateJobs") for span in exported.spans(name)}
    writes = [span for span in exported.spans("jobstatus store commit") if f"{span.context.trace_id:032x}" == TRACE]
    linked = [link.context.span_id for span in writes for link in span.links]
    assert sorted(linked) == sorted(calls)
    assert [len(span.links) for span in writes] == [1, 21]
    commits = [s for s in exported.spans("jobstatus commit") if f"{s.context.trace_id:032x}" == TRACE]
    assert {span.parent.span_id for span in commits} == calls


async def first_update(messages):
    types = set()
    while pb.JOB_EVENT_TYPE_UPDATED not in types:
        message = await messages.read()
        types = {event.type for event in getattr(message, "events", None) or [message.event]}


def watch(stub, kind, job_id):
    if kind == "WatchJob":
        return stub.WatchJob(pb.WatchJobRequest(id=job_id))
    return stub.WatchJobs(pb.WatchJobsRequest(filter=pb.JobFilter(ids=[job_id])))


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("kind", ["WatchJob", "WatchJobs"])
@in_loop
async def test_a_delivery_is_linked_to_the_update_and_to_the_watch(kind, transport):
    exported = Exported()
    async with serving(MemoryStore(), tracing=exported.tracing, transport=transport) as stub:
        await create(stub, "a")
        messages = watch(stub, kind, "a")
        await messages.read()
        await update(stub, "a", 1)
        await first_update(messages)
        messages.cancel()
    call, delivery = exported.span("UpdateJob"), exported.span("jobstatus deliver")
    assert delivery.parent == call.context
    assert [link.context for link in delivery.links] == [call.context, exported.span(kind).context]
    assert delivery.attributes["jobstatus.job.id"] == "a"


@in_loop
async def test_a_heartbeat_does_not_take_over_the_delivery_of_the_change_before_it():
    exported = Exported()
    async with serving(MemoryStore(), tracing=exported.tracing) as stub:
        await create(stub, "a")
        messages = stub.WatchJob(pb.WatchJobRequest(id="a", min_update_interval=Duration(nanos=500_000_000)))
        await messages.read()
        for progress in (1, 2):  # the second is held back
            await update(stub, "a", progress)
        await update(stub, "a", 2, HEARTBEAT_TRACE, mask=[])
        for _ in range(2):
            await first_update(messages)
        messages.cancel()
    assert {f"{span.context.trace_id:032x}" for span in exported.spans("jobstatus deliver")} == {TRACE}


def test_a_job_created_again_has_causes_of_its_own():
    tracing = Exported().tracing
    job = replace(BLANK, id="a", revision=3)
    command: Any = SimpleNamespace(tenant=job.tenant, id="a")
    again = replace(job, revision=1, created_at=job.created_at + timedelta(days=2))
    spans = [tracing.tracer.start_span("call").get_span_context() for _ in range(2)]
    for span, outcome in zip(spans, (job, again), strict=True):
        tracing.committed(span, command, outcome)
    cause = tracing._cause_of(again)
    assert cause is not None
    assert cause.span == spans[1]


@in_loop
async def test_a_delivery_by_another_process_is_linked_to_the_trace_of_the_job():
    store, exported = MemoryStore(), Exported()
    async with serving(store) as writer, serving(store, tracing=exported.tracing) as reader:
        await create(writer, "a", trace_parent=PARENT)
        messages = watch(reader, "WatchJob", "a")
        await messages.read()
        await update(writer, "a", 1)
        await first_update(messages)
        messages.cancel()
    delivery = exported.span("jobstatus deliver")
    assert f"{delivery.links[0].context.span_id:016x}" == SPAN
    assert f"{delivery.context.trace_id:032x}" == TRACE


@in_loop
async def test_a_change_has_spans_for_some_of_its_deliveries_only(monkeypatch):
    monkeypatch.setattr(tracing, "MAX_DELIVERIES", 2)
    exported = Exported()
    async with serving(MemoryStore(), tracing=exported.tracing) as stub:
        await create(stub, "a")
        streams = [watch(stub, "WatchJob", "a") for _ in range(4)]
        for messages in streams:
            await messages.read()
        await update(stub, "a", 1)
        for messages in streams:
            await first_update(messages)
            messages.cancel()
    assert len(exported.spans("jobstatus deliver")) == 2


@in_loop
async def test_nothing_is_recorded_for_a_caller_that_does_not_sample():
    exported = Exported()
    async with serving(MemoryStore(), tracing=exported.tracing) as stub:
        await create(stub, "a", UNSAMPLED)
        await update(stub, "a", 1, UNSAMPLED)
    assert not exported.tracing._causes
    assert not [span for name in ("CreateJob", "jobstatus commit") for span in exported.spans(name)]


@in_loop
async def test_a_sampler_that_is_not_of_the_parent_decides_also_for_a_caller_that_does_not_sample():
    exported = Exported(ALWAYS_ON)
    async with serving(MemoryStore(), tracing=exported.tracing) as stub:
        await create(stub, "a", UNSAMPLED)
    assert f"{exported.span('CreateJob').context.trace_id:032x}" == TRACE


@pytest.mark.parametrize(
    ("sampler", "least", "most"),
    [
        (ParentBased(ALWAYS_OFF), 0, 0),
        (ParentBased(ALWAYS_ON), 400, 400),
        (ParentBased(TraceIdRatioBased(0.5)), 120, 280),  # 8 standard deviations
        (TraceIdRatioBased(0.5), 120, 280),
    ],
    ids=["never", "always", "half, by the parent", "half"],
)
def test_new_traces_are_sampled_at_the_rate_of_the_sampler(sampler, least, most):
    exported = Exported(sampler)
    peer: Any = SimpleNamespace(peer=str)
    calls = [exported.tracing.begin(SERVICE, "GetJob", (), peer) for _ in range(400)]
    for call in filter(None, reversed(calls)):
        call.end("OK", "", "")
    assert least <= len(exported.spans("GetJob")) == len([*filter(None, calls)]) <= most


@in_loop
async def test_the_line_of_a_call_in_the_log_has_the_ids_of_its_span():
    class Lines:
        text = ""

        def write(self, text):
            self.text += text

    lines, exported = Lines(), Exported()
    log = RequestLog(log_format="json", stream=lines)
    async with serving(MemoryStore(), tracing=exported.tracing, request_log=log) as stub:
        await create(stub, "a", SAMPLED)
        await create(stub, "b", UNSAMPLED)
    traced, plain = map(json.loads, lines.text.splitlines())
    assert traced["trace_id"] == TRACE
    assert traced["span_id"] == f"{exported.span('CreateJob').context.span_id:016x}"
    assert "trace_id" not in plain


@in_loop
async def test_a_malformed_trace_context_begins_a_new_trace():
    exported = Exported()
    async with serving(MemoryStore(), tracing=exported.tracing) as stub:
        await create(stub, "a", (("traceparent", "00-nonsense-01"),))
    assert exported.span("CreateJob").parent is None


@pytest.mark.parametrize("state", ["no member", "a=" + "x" * 600])
def test_a_malformed_trace_context_is_not_logged(caplog, monkeypatch, state):
    monkeypatch.setattr(tracing, "open_provider", lambda name: TracerProvider())
    peer: Any = SimpleNamespace(peer=str)
    call = ServerTracing.open().begin(SERVICE, "GetJob", (("traceparent", PARENT), ("tracestate", state)), peer)
    assert call is not None
    call.end("OK", "", "")
    assert not caplog.records


def test_a_server_without_the_extra_says_what_to_install(monkeypatch):
    for name in ("jobstatus_grpc.server.tracing", "jobstatus_grpc.telemetry"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(CannotStartError, match=r"pip install 'jobstatus-grpc\[otel\]'"):
        _open_tracing()
