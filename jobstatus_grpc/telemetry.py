"""OpenTelemetry: the provider of spans, W3C trace contexts, and the spans of a client. Needs the extra `otel`.

Imported only where tracing is switched on: `serve --otel`, `run --otel`, and clients with `tracing=True`. The spans of
the server are in server/tracing.py.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

SCOPE = "jobstatus_grpc"
"""The name of the instrumentation in each span."""

NOT_SET = "unknown_service"
"""How the SDK's default for service.name begins."""

EXPORT_SECONDS = 3.0
"""For the export of the last spans, when a program ends."""

_propagator = TraceContextTextMapPropagator()


def open_provider(service_name: str) -> TracerProvider:
    """Return a provider that exports spans by OTLP over gRPC, as the standard variables `OTEL_*` say; see `close`.

    Sending is in a thread; while no collector can be reached, spans are dropped. `service_name` is the service.name if
    no variable sets it.
    """
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    resource = Resource.create()
    if str(resource.attributes[SERVICE_NAME]).startswith(NOT_SET):
        resource = resource.merge(Resource({SERVICE_NAME: service_name}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


def close(provider: TracerProvider) -> None:
    """Send the spans that are left, for at most EXPORT_SECONDS: a collector may be away."""
    export = threading.Thread(target=provider.shutdown, name="last spans", daemon=True)
    export.start()
    export.join(EXPORT_SECONDS)


def context_of(trace_parent: str, trace_state: str = "") -> Context:
    """Return the context in which a remote span is active; an empty one if `trace_parent` is not valid."""
    carrier = {"traceparent": trace_parent}
    if trace_state:
        carrier["tracestate"] = trace_state
    return _propagator.extract(carrier, Context())


def span_context_of(trace_parent: str) -> trace.SpanContext:
    """Return what `trace_parent` names; its `is_valid` is False if that is nothing."""
    return trace.get_current_span(context_of(trace_parent)).get_span_context()


def trace_parent_of(span: trace.SpanContext) -> str:
    """Return a span as a W3C traceparent."""
    return f"00-{span.trace_id:032x}-{span.span_id:016x}-{span.trace_flags:02x}"


def log_fields() -> Mapping[str, str]:
    """Return the ids of the active span for a line of the log; empty if none is active."""
    span = trace.get_current_span()
    return fields_of(span.get_span_context()) if span.is_recording() else {}


def fields_of(span: trace.SpanContext) -> Mapping[str, str]:
    """Return the ids of a span for a line of the log."""
    return {"trace_id": f"{span.trace_id:032x}", "span_id": f"{span.span_id:016x}"}


@contextmanager
def program_span(name: str, job_name: str, variables: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Make a span for the block, in the trace of environment variables; return the variables that name this span.

    It is exported when the block ends. Meanwhile the provider is the program's global one.
    """
    logging.getLogger("opentelemetry").setLevel(logging.ERROR)  # what is tried again is no news on a program's stderr
    provider = open_provider("jobstatus-run")
    trace.set_tracer_provider(provider)
    parent = context_of(variables.get("TRACEPARENT", ""), variables.get("TRACESTATE", ""))
    try:
        attributes = {"jobstatus.job.name": job_name}
        with provider.get_tracer(SCOPE).start_as_current_span(name, parent, attributes=attributes):
            carrier: dict[str, str] = {}
            _propagator.inject(carrier)
            yield {key.upper(): value for key, value in carrier.items()}
    finally:
        close(provider)


def call_attributes(service: str, method: str) -> dict[str, str]:
    """Return the attributes that the semantic conventions ask of each gRPC call."""
    return {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method}


class ClientTracing:
    """The spans of a client's calls and events. Uses a provider, by default the program's global one."""

    def __init__(self, provider: trace.TracerProvider | None = None) -> None:
        self._tracer = trace.get_tracer(SCOPE, tracer_provider=provider)

    def __reduce__(self) -> tuple[type[ClientTracing], tuple[()]]:
        # A provider cannot be copied; a copy uses the global one of the program that it is in.
        return ClientTracing, ()

    @contextmanager
    def call(self, service: str, method: str) -> Iterator[None]:
        """Make a span of a call, with all its tries, active for the block; an exception is recorded in it."""
        attributes = call_attributes(service, method)
        with self._tracer.start_as_current_span(
            f"{service}/{method}", kind=trace.SpanKind.CLIENT, attributes=attributes
        ):
            yield

    def trace_parent(self) -> str:
        """Return the active span as a W3C traceparent; empty if none is active, or if it is not sampled."""
        span = trace.get_current_span().get_span_context()
        return trace_parent_of(span) if span.is_valid and span.trace_flags.sampled else ""

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Return the active context as metadata of a call; empty if there is none."""
        carrier: dict[str, str] = {}
        _propagator.inject(carrier)
        return tuple(carrier.items())

    def received(self, job_id: str, revision: int, trace_parent: str) -> None:
        """Record that a watch returned a change of a job whose trace is known: a span that links to `trace_parent`.

        It is a child of the active span; without one, it is in the job's trace.
        """
        origin = context_of(trace_parent)
        link = trace.Link(trace.get_current_span(origin).get_span_context())
        has_active = trace.get_current_span().get_span_context().is_valid
        self._tracer.start_span(
            "jobstatus receive",
            context=None if has_active else origin,
            kind=trace.SpanKind.CONSUMER,
            attributes={"jobstatus.job.id": job_id, "jobstatus.job.revision": revision},
            links=[link],
        ).end()
