"""A real gRPC server with scripted answers, good and bad, for what a healthy server never does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.errors import JobStatusError
from jobstatus_grpc.wire import status

SERVICE = "jobstatus.v1.JobStatusService"
Answer = Callable[[Any, grpc.ServicerContext], Any]


def a_job(
    revision: int = 1, state: Any = pb.JobState.JOB_STATE_IN_PROGRESS, created: int = 1, **fields: Any
) -> pb.JobStatus:
    job = pb.JobStatus(state=state, revision=revision, **{"id": "a"} | fields)
    job.created_at.seconds = job.updated_at.seconds = created
    return job


def a_done_job(revision: int = 9) -> pb.JobStatus:
    return a_job(revision, pb.JobState.JOB_STATE_SUCCEEDED, done=True)


def an_event(job: pb.JobStatus, type: Any = pb.JobEventType.JOB_EVENT_TYPE_UPDATED) -> bytes:
    return pb.WatchJobResponse(event=pb.JobEvent(type=type, job=job)).SerializeToString()


def some_events(*events: tuple[str, pb.JobStatus | None], token: str = "") -> bytes:
    """A message of WatchJobs: events as `("UPDATED", job)`, and the token after them."""
    message = pb.WatchJobsResponse(resume_token=token)
    for name, job in events:
        message.events.add(type=pb.JobEventType.Value(f"JOB_EVENT_TYPE_{name}"), job=job)
    return message.SerializeToString()


def a_stream(*messages: bytes, then: Answer | None = None) -> Answer:
    """A stream of `messages` that ends with OK, or as `then` does."""

    def answer(request: Any, context: grpc.ServicerContext) -> Iterator[bytes]:
        yield from messages
        if then is not None:
            then(request, context)

    return answer


def refuse(error: JobStatusError) -> Answer:
    """End a call as our server does for an error of the tree."""

    def answer(request: Any, context: grpc.ServicerContext) -> bytes:
        context.set_trailing_metadata(status.trailers_of(error))
        context.abort(status.code_of(error), error.message)

    return answer


def fail(code: grpc.StatusCode) -> Answer:
    """End a call as proxies and broken servers do: a code and nothing else."""

    def answer(request: Any, context: grpc.ServicerContext) -> bytes:
        context.abort(code, "as scripted")

    return answer


def reply(message: Any) -> Answer:
    return lambda request, context: message.SerializeToString()


class ScriptedServer:
    """Gives each of an RPC's answers once, and the last one again and again. A context manager.

    `requests` holds the requests by RPC, `silence` is an answer that sends nothing until the client has left, and each
    call releases `ended` when it is over.
    """

    def __init__(self, credentials: grpc.ServerCredentials | None = None, **answers: list[Answer]) -> None:
        self.requests: dict[str, list[Any]] = {name: [] for name in answers}
        self.metadata: list[dict[str, str | bytes]] = []
        self.ended = threading.Semaphore(0)
        self._answers = {name: list(script) for name, script in answers.items()}
        self._asked = threading.Condition()
        self._server = grpc.server(futures.ThreadPoolExecutor(8))
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, dict(self._handlers()))])
        port = (
            self._server.add_insecure_port("127.0.0.1:0")
            if credentials is None
            else self._server.add_secure_port("127.0.0.1:0", credentials)
        )
        self.address = f"127.0.0.1:{port}"

    def __enter__(self) -> ScriptedServer:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(0).wait()

    def script(self, name: str, *answers: Answer) -> None:
        """Set an RPC's answers afterwards, if they need the server itself."""
        self._answers[name] = list(answers)

    def await_request(self, name: str, count: int = 1) -> None:
        """Wait until clients have made `count` calls."""
        with self._asked:
            assert self._asked.wait_for(lambda: len(self.requests[name]) >= count, timeout=10)

    def silence(self, request: Any, context: grpc.ServicerContext) -> bytes:
        """Send nothing until the client leaves or the server stops."""
        over = threading.Event()
        if context.add_callback(over.set):
            over.wait()
        return b""

    def silent_stream(self, request: Any, context: grpc.ServicerContext) -> Iterator[bytes]:
        """A stream without messages."""
        return a_stream(then=self.silence)(request, context)

    def _handlers(self) -> Iterator[tuple[str, grpc.RpcMethodHandler[Any, Any]]]:
        for method in pb.DESCRIPTOR.services_by_name["JobStatusService"].methods:
            if method.name in self._answers:
                make = (
                    grpc.unary_stream_rpc_method_handler
                    if method.server_streaming
                    else grpc.unary_unary_rpc_method_handler
                )
                parse = getattr(pb, method.input_type.name).FromString
                yield method.name, make(self._answer(method.name), request_deserializer=parse)

    def _answer(self, name: str) -> Answer:
        def answer(request: Any, context: grpc.ServicerContext) -> Any:
            self.metadata.append({"peer": context.peer(), **dict(context.invocation_metadata())})
            if not context.add_callback(self.ended.release):
                self.ended.release()
            with self._asked:
                self.requests[name].append(request)
                self._asked.notify_all()
            script = self._answers[name]
            return (script.pop(0) if len(script) > 1 else script[0])(request, context)

        return answer
