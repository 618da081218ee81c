"""A collector of OpenTelemetry spans: OTLP over gRPC, as real collectors receive it."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)

LONGEST_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class ReceivedSpan:
    """A span; ids in hexadecimal."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    links: tuple[tuple[str, str], ...]
    """The trace and the span of each."""


class Collector(TraceServiceServicer):
    """Keeps the spans that programs export to `endpoint`."""

    def __init__(self) -> None:
        self.endpoint = ""
        self._spans: list[ReceivedSpan] = []
        self._change = threading.Condition()

    def Export(
        self, request: otlp.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> otlp.ExportTraceServiceResponse:
        with self._change:
            self._spans += _spans_in(request)
            self._change.notify_all()
        return otlp.ExportTraceServiceResponse()

    def wait_for(self, names: Collection[str]) -> dict[str, ReceivedSpan]:
        """Return the last span of each name once there is one."""
        with self._change:
            complete = self._change.wait_for(lambda: set(names) <= {span.name for span in self._spans}, LONGEST_SECONDS)
            assert complete, f"of {sorted(names)} there are only {sorted({span.name for span in self._spans})}"
            return {span.name: span for span in self._spans}

    def received(self) -> list[ReceivedSpan]:
        """Return all spans until now."""
        with self._change:
            return list(self._spans)


def _spans_in(request: otlp.ExportTraceServiceRequest) -> Iterator[ReceivedSpan]:
    for resource in request.resource_spans:
        (service,) = [each.value for each in resource.resource.attributes if each.key == "service.name"]
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield ReceivedSpan(
                    service.string_value,
                    span.name,
                    span.trace_id.hex(),
                    span.span_id.hex(),
                    span.parent_span_id.hex(),
                    tuple((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
                )


@contextmanager
def collecting() -> Iterator[Collector]:
    """Return a collector that listens during the block."""
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    add_TraceServiceServicer_to_server(collector, server)
    collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(None).wait()
