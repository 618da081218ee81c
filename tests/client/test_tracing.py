"""The spans of a client, and the trace that it gives to jobs."""

from __future__ import annotations

import asyncio
import copy
import pickle

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from jobstatus_grpc import AsyncJobStatusClient, InvalidFieldError, JobStatusClient, JobUpdate, NotFoundError
from jobstatus_grpc.telemetry import ClientTracing, trace_parent_of

SERVICE = "jobstatus.v1.JobStatusService"
OTHER = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


class Traced:
    """A provider that exports to memory."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))

    def client(self, kind, address):
        client = kind(address)
        client._connection.tracing = ClientTracing(self.provider)  # not the program's provider, which is set only once
        return client

    def span(self):
        return self.provider.get_tracer("test").start_as_current_span("work")

    def spans(self, name):
        return [span for span in self._exporter.get_finished_spans() if span.name == name]


@pytest.fixture
def traced():
    return Traced()


def test_all_ways_to_report_give_the_job_the_active_trace(traced, memory_service, new_id):
    ids = [new_id() for _ in range(5)]
    with traced.client(JobStatusClient, memory_service.address) as client:
        for job_id in ids[1:4]:
            client.create(id=job_id)
        with traced.span() as span:
            client.create(id=ids[0])
            client.update(ids[1], progress=1)
            client.batch_update([JobUpdate(ids[2], progress=1)])
            with client.reporter() as reporter:
                reporter.update(ids[3], progress=1)
            with client.track(id=ids[4], name="x"):
                pass
        expected = trace_parent_of(span.get_span_context())
        assert [client.get(job_id).trace_parent for job_id in ids] == [expected] * 5
    parents = {each.parent.span_id for each in traced.spans(f"{SERVICE}/BatchUpdateJobs")}
    assert parents == {span.get_span_context().span_id}


def test_a_heartbeat_and_an_update_with_a_trace_of_its_own_are_sent_as_they_are(traced, memory_service, new_id):
    with traced.client(JobStatusClient, memory_service.address) as client:
        job = client.create(id=new_id(), trace_parent=OTHER)
        with traced.span():
            assert client.update(job.id) == job
            assert client.update(job.id, reason="r", trace_parent=OTHER).trace_parent == OTHER
            assert client.update(job.id, trace_parent=None).trace_parent == ""


def test_a_request_sent_again_in_another_span_is_known(traced, memory_service, new_id):
    request_id = new_id()
    with traced.client(JobStatusClient, memory_service.address) as client:
        with traced.span():
            job = client.create("x", request_id=request_id)
            now = client.update(job.id, progress=5, request_id="r")
        with traced.span():
            assert client.create("x", request_id=request_id) == now
            assert client.update(job.id, progress=5, request_id="r") == now


def test_the_asyncio_client_has_a_span_for_a_call_that_fails(traced, memory_service):
    async def main():
        async with traced.client(AsyncJobStatusClient, memory_service.address) as client:
            with pytest.raises(NotFoundError):
                await client.get("unknown")

    asyncio.run(main())
    (span,) = traced.spans(f"{SERVICE}/GetJob")
    assert span.kind is trace.SpanKind.CLIENT
    assert span.status.status_code is trace.StatusCode.ERROR


def test_a_watch_of_many_jobs_records_what_it_received_in_the_trace_of_the_job(traced, memory_service, new_id):
    with traced.client(JobStatusClient, memory_service.address) as client:
        job = client.create(id=new_id(), trace_parent=OTHER)
        with client.watch_jobs(resume_token=client.list().resume_token) as changes:
            client.update(job.id, reason="r")
            next(change for change in changes if change.id == job.id)
    (span,) = traced.spans("jobstatus receive")
    assert trace_parent_of(span.parent) == trace_parent_of(span.links[0].context) == OTHER


@pytest.mark.parametrize("kind", [JobStatusClient, AsyncJobStatusClient])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda client: pickle.loads(pickle.dumps(client))])
def test_a_copy_of_a_client_is_traced_too(traced, kind, copied):
    assert isinstance(copied(traced.client(kind, "127.0.0.1:1"))._connection.tracing, ClientTracing)


@pytest.mark.parametrize("value", ["x", OTHER[:-1], OTHER.upper(), f"01{OTHER[2:]}", f"00-{'0' * 32}{OTHER[35:]}"])
def test_what_is_no_traceparent_is_refused_and_left_out_by_track(memory_service, new_id, value):
    with JobStatusClient(memory_service.address) as client:
        with pytest.raises(InvalidFieldError, match="trace_parent"):
            client.create(trace_parent=value)
        with pytest.raises(InvalidFieldError, match="trace_parent"):
            client.update(client.create(id=new_id()).id, trace_parent=value)
        with client.track(trace_parent=value) as job:
            assert job.attempt == 1
        assert client.get(job.id).trace_parent == ""
