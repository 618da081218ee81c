"""The server's spans: of each call, of commits, of what the store writes, and of the delivery to watches.

Used only with `--otel`; the SDK's samplers decide. What is not sampled costs a look at the call's metadata.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from datetime import datetime
from random import getrandbits
from typing import Any

import grpc
from opentelemetry import context, trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import Decision, ParentBased, StaticSampler, TraceIdRatioBased
from opentelemetry.trace import Link, SpanKind, StatusCode

from jobstatus_grpc import telemetry
from jobstatus_grpc.commit_queue import CommitQueue
from jobstatus_grpc.job import Command, Job, Outcome
from jobstatus_grpc.server.transports.interface import CallContext, Metadata
from jobstatus_grpc.stores.interface import CommitResult, JobStore, Key
from jobstatus_grpc.telemetry import (
    SCOPE,
    call_attributes,
    context_of,
    fields_of,
    open_provider,
    span_context_of,
)
from jobstatus_grpc.watch.watcher import OnDelivery

MAX_CAUSES = 10_000
"""Updates whose spans are remembered for the deliveries that follow, about 500 bytes each. A delivery follows within
min_update_interval; for an older update it links to the job's trace_parent."""

MAX_LINKS = 128
"""Of the span of one commit: the SDK's own limit. A commit may hold 1,000 updates."""

MAX_DELIVERIES = 10
"""Spans for the delivery of one change: a job may have thousands of watches, and its trace is to stay readable."""

_SERVER_ERRORS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})
"""The codes that the semantic conventions count as errors of a server."""

_LOGGERS_OF_CALLERS_VALUES = ("opentelemetry.trace.span", "opentelemetry.trace.propagation.tracecontext")
"""Log a traceparent or tracestate that is not valid at WARNING: callers without credentials could fill the log."""

_STEP = 4


class _DrawnIds(RandomIdGenerator):
    """Gives a new trace the id for which the decision to sample it was made."""

    drawn: int | None = None

    def generate_trace_id(self) -> int:
        drawn, self.drawn = self.drawn, None
        return drawn or super().generate_trace_id()


class CallSpan:
    """The span of a call, active from the beginning until `end`, in one task."""

    __slots__ = ("_span", "_token", "fields")

    def __init__(self, span: trace.Span) -> None:
        self._span = span
        self._token = context.attach(trace.set_span_in_context(span))
        self.fields = fields_of(span.get_span_context())
        """Its ids, for the log."""

    def end(self, code: str, reason: str, job_id: str) -> None:
        """End it with the name of the gRPC code, the reason of the error and the job, which may be empty."""
        span = self._span
        span.set_attribute("rpc.grpc.status_code", grpc.StatusCode[code].value[0])
        if reason:
            span.set_attribute("error.type", reason)
        if job_id:
            span.set_attribute("jobstatus.job.id", job_id)
        if code in _SERVER_ERRORS:
            span.set_status(StatusCode.ERROR, reason or code)
        span.end()
        context.detach(self._token)


class _Cause:
    """An update whose change is delivered to watches."""

    __slots__ = ("committed_at", "deliveries", "span", "version")

    def __init__(self, job: Job, span: trace.SpanContext, committed_at: int | None) -> None:
        self.version = _version_of(job)
        self.span = span
        self.committed_at = committed_at
        """In nanoseconds since 1970; None: by another process."""
        self.deliveries = 0


def _version_of(job: Job) -> tuple[datetime, int]:
    return job.created_at, job.revision  # a job that is deleted and created again begins with revision 1


class ServerTracing:
    """Makes the spans of one process. For one event loop."""

    def __init__(self, provider: TracerProvider) -> None:
        """Take the provider, which gets another generator of ids."""
        self._provider = provider
        self._ids = provider.id_generator = _DrawnIds()
        self.tracer = provider.get_tracer(SCOPE)
        self._drops_unsampled, self._bound = _decisions(provider)
        self._causes: OrderedDict[Key, _Cause] = OrderedDict()

    @classmethod
    def open(cls) -> ServerTracing:
        """Return one that exports as the variables `OTEL_*` say."""
        for name in _LOGGERS_OF_CALLERS_VALUES:
            logging.getLogger(name).setLevel(logging.ERROR)
        return cls(open_provider("jobstatus"))

    def close(self) -> None:
        """Send the spans that are left. Blocks, for at most telemetry.EXPORT_SECONDS."""
        telemetry.close(self._provider)

    def commit_queue(self, store: JobStore, **arguments: Any) -> CommitQueue:
        """Return a CommitQueue with these arguments that makes spans."""
        return _TracedCommitQueue(store, self, **arguments)

    def begin(self, service: str, method: str, metadata: Metadata, call: CallContext) -> CallSpan | None:
        """Begin the span of a call and make it active; None: it is not sampled."""
        for key, value in metadata:
            if key == "traceparent":
                trace_parent = str(value)
                if self._drops_unsampled and trace_parent.endswith("-00"):
                    return None
                parent = context_of(trace_parent, str(dict(metadata).get("tracestate", "")))
                break
        else:
            if self._bound is not None:
                drawn = getrandbits(128)
                if drawn & _LOW_BITS >= self._bound:
                    return None
                self._ids.drawn = drawn
            parent = context.Context()
        span = self.tracer.start_span(f"{service}/{method}", parent, SpanKind.SERVER, call_attributes(service, method))
        if not span.is_recording():
            return None
        span.set_attribute("network.peer.address", call.peer())
        return CallSpan(span)

    def committed(self, span: trace.SpanContext, command: Command, outcome: Outcome) -> None:
        """Remember which update made a change; the first for each revision: heartbeats and replays make none."""
        if not isinstance(outcome, Job):
            return
        key = (command.tenant, command.id)
        known = self._causes.get(key)
        if known is None or known.version < _version_of(outcome):
            self._remember(key, _Cause(outcome, span, time.time_ns()))

    def _remember(self, key: Key, cause: _Cause) -> None:
        self._causes[key] = cause
        self._causes.move_to_end(key)
        if len(self._causes) > MAX_CAUSES:
            self._causes.popitem(last=False)

    def watch(self) -> OnDelivery:
        """Return what a watch that begins now calls with each job that it sends after a change."""
        of_watch = trace.get_current_span().get_span_context()
        watch_link = [Link(of_watch)] if of_watch.is_valid else []

        def deliver(job: Job) -> None:
            cause = self._cause_of(job)
            if cause is None or cause.deliveries >= MAX_DELIVERIES:
                return
            cause.deliveries += 1
            self.tracer.start_span(
                "jobstatus deliver",
                trace.set_span_in_context(trace.NonRecordingSpan(cause.span), context.Context()),
                SpanKind.PRODUCER,
                {"jobstatus.job.id": job.id, "jobstatus.job.revision": job.revision},
                [Link(cause.span), *watch_link],
                start_time=cause.committed_at,
            ).end()

        return deliver

    def _cause_of(self, job: Job) -> _Cause | None:
        """Return the update that made this revision; if it is not known, what the job's trace_parent names."""
        key = (job.tenant, job.id)
        cause = self._causes.get(key)
        if cause is not None and cause.version == _version_of(job):
            return cause
        if not job.trace_parent or job.trace_parent.endswith("-00"):
            return None
        cause = _Cause(job, span_context_of(job.trace_parent), None)
        self._remember(key, cause)
        return cause


_LOW_BITS = (1 << 64) - 1


def _decisions(provider: TracerProvider) -> tuple[bool, int | None]:
    """Return what the samplers of the SDK decide, to save calling them: most calls are not sampled.

    Returns:
        Whether a caller that does not sample decides, and below which number the low 64 bits of the id of a new trace
        must be; None: the sampler has to be asked.
    """
    sampler = provider.sampler
    if not isinstance(sampler, (ParentBased, StaticSampler, TraceIdRatioBased)):
        return False, None

    def is_dropped(trace_id: int, parent: context.Context) -> bool:
        return sampler.should_sample(parent, trace_id, "").decision is Decision.DROP

    unsampled = context_of(f"00-{1:032x}-{1:016x}-00")
    new = context.Context()
    steps = range(0, 1 << 64, _STEP)
    bound = _STEP * bisect_left(steps, True, key=lambda trace_id: is_dropped(trace_id, new))
    # An id of zeros is dropped only where each is.
    return is_dropped(0, unsampled), bound


class _TracedCommitQueue(CommitQueue):
    """A commit queue with a span for each submission of a sampled call, and one for what the store then writes."""

    def __init__(self, store: JobStore, tracing: ServerTracing, **arguments: Any) -> None:
        super().__init__(store, **arguments)
        self._tracing = tracing
        self._origins: dict[int, trace.SpanContext] = {}
        """The call's span, by the identity of each command that is submitted and not yet committed."""

    async def submit(self, commands: Sequence[Command]) -> list[Outcome]:
        call = trace.get_current_span()
        if not call.is_recording():
            return await super().submit(commands)
        for command in commands:
            self._origins[id(command)] = call.get_span_context()
        try:
            with self._tracing.tracer.start_as_current_span(
                "jobstatus commit", attributes={"jobstatus.commands": len(commands)}
            ):
                return await super().submit(commands)
        finally:
            for command in commands:
                self._origins.pop(id(command), None)

    def _start_committer_if_needed(self) -> None:
        if not self._origins:
            super()._start_committer_if_needed()
            return
        # The task of a committer commits for others too, and must not have this call's span as its own.
        token = context.attach(context.Context())
        try:
            super()._start_committer_if_needed()
        finally:
            context.detach(token)

    async def _commit(self, commands: Sequence[Command]) -> CommitResult:
        if not self._origins:
            return await super()._commit(commands)
        origins = [self._origins.get(id(command)) for command in commands]
        spans = list({span.span_id: span for span in origins if span is not None}.values())
        if not spans:
            return await super()._commit(commands)
        with self._tracing.tracer.start_as_current_span(
            "jobstatus store commit",
            trace.set_span_in_context(trace.NonRecordingSpan(spans[0]), context.Context()),
            SpanKind.CLIENT,
            {"db.operation.name": "COMMIT", "db.operation.batch.size": len(commands)},
            [Link(span) for span in spans[:MAX_LINKS]],
        ):
            result = await super()._commit(commands)
        for command, outcome, span in zip(commands, result.outcomes, origins, strict=True):
            if span is not None:
                self._tracing.committed(span, command, outcome)
        return result
