"""Mutated requests, tokens and metadata: only documented errors, and a refused call changes nothing."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2, field_mask_pb2, struct_pb2, timestamp_pb2
from google.protobuf.descriptor import FieldDescriptor
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.errors import error_classes
from jobstatus_grpc.job.limits import MAX_REQUEST_BYTES
from tests.support.servers import ServerProcess
from tests.support.service import read_refusal

INPUTS, INPUTS_IN_FULL = 1500, 100_000
AT_ONCE = 250
SERVICE = pb.DESCRIPTOR.services_by_name["JobStatusService"]
METHODS = {method.name: method for method in SERVICE.methods}
STREAMS = {name for name, method in METHODS.items() if method.server_streaming}
DOCUMENTED = {
    grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.ABORTED, grpc.StatusCode.RESOURCE_EXHAUSTED,
}  # fmt: skip
REASONS = {error.reason for error in error_classes() if error.reason}

SECOND = duration_pb2.Duration(seconds=1)


def job_of(job_id):
    """A job with every field that a client sets."""
    result = struct_pb2.Struct()
    result.update({"text": "x", "list": [1, None, {"deep": True}]})
    return pb.JobStatus(
        id=job_id, name="n", state=pb.JOB_STATE_IN_PROGRESS, reason="r", progress=42, labels={"k": "v"}, result=result,
        heartbeat_timeout=duration_pb2.Duration(seconds=30), parent_id="p",
        estimated_completion=timestamp_pb2.Timestamp(seconds=1),
    )  # fmt: skip


def samples(job_id, tokens):
    """Valid requests of each RPC about a job, with tokens of the server."""
    job = job_of(job_id)
    update = pb.UpdateJobRequest(job=job, attempt=1, expected_revision=1, request_id="q", allow_missing=True)
    masked = pb.UpdateJobRequest(job=job, update_mask=field_mask_pb2.FieldMask(paths=["reason", "labels"]))
    failed = pb.JobStatus(id=job_id, state=pb.JOB_STATE_FAILED, error=pb.JobError(code=2, message="m"))
    job_filter = pb.JobFilter(
        ids=[job_id, "b"], states=[pb.JOB_STATE_FAILED], names=["n"], labels={"k": "v"}, done=False
    )
    return {
        "CreateJob": [pb.CreateJobRequest(job=job, request_id="q"), pb.CreateJobRequest(job=pb.JobStatus(name="n"))],
        "GetJob": [pb.GetJobRequest(id=job_id)],
        "UpdateJob": [update, masked, pb.UpdateJobRequest(job=failed)],
        "BatchUpdateJobs": [pb.BatchUpdateJobsRequest(updates=[update, masked])],
        "CancelJob": [pb.CancelJobRequest(id=job_id, reason="r", request_id="q")],
        "DeleteJob": [pb.DeleteJobRequest(id=job_id, expected_revision=3)],
        "ListJobs": [pb.ListJobsRequest(filter=job_filter, page_size=2), pb.ListJobsRequest(page_token=tokens["page"])],
        "ListJobTransitions": [pb.ListJobTransitionsRequest(id=job_id, page_token=tokens["history"])],
        "WatchJob": [pb.WatchJobRequest(id=job_id, heartbeat_interval=SECOND, min_update_interval=SECOND)],
        "WatchJobs": [
            pb.WatchJobsRequest(filter=job_filter, heartbeat_interval=SECOND),
            pb.WatchJobsRequest(resume_token=tokens["resume"]),
        ],
        "GetCallerIdentity": [pb.GetCallerIdentityRequest()],
    }


ODD_TEXTS = ["", "a", "\0", "\n", "x" * 5000, "é" * 129, "\U0010ffff", "a/b", "..", "*", "labels.k"]
ODD_NUMBERS = [0, 1, -1, 2**31 - 1, -(2**31)]
ODD_LARGE_NUMBERS = [*ODD_NUMBERS, 2**63 - 1, -(2**63)]
ODD_FLOATS = [0.0, -0.0, float("nan"), float("inf"), -1e308, 100.0000001]
ODD: dict[int, list[Any]] = {
    FieldDescriptor.TYPE_STRING: ODD_TEXTS,
    FieldDescriptor.TYPE_BOOL: [True, False],
    FieldDescriptor.TYPE_INT32: ODD_NUMBERS,
    FieldDescriptor.TYPE_INT64: ODD_LARGE_NUMBERS,
    FieldDescriptor.TYPE_ENUM: [*range(-1, 9), 2**31 - 1],
    FieldDescriptor.TYPE_DOUBLE: ODD_FLOATS,
}


def change_field(message, chance):
    """Give one field, here or in a message below, an odd value, or change its text, as of an id or a token."""
    field = chance.choice(message.DESCRIPTOR.fields)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = chance.choice(ODD_TEXTS), field.message_type.fields_by_name["value"]
        if value.message_type is None:
            getattr(message, field.name)[key] = chance.choice(ODD[value.type])
        else:
            getattr(message, field.name)[key].number_value = chance.choice(ODD_FLOATS)
    elif field.message_type is not None:
        below = getattr(message, field.name)
        change_field(below.add() if field.is_repeated else below, chance)
    elif field.is_repeated:
        getattr(message, field.name).extend([chance.choice(ODD[field.type])] * chance.choice([1, 2, 3, 70]))
    elif (text := getattr(message, field.name)) and isinstance(text, str) and chance.random() < 0.7:
        setattr(message, field.name, change_text(text, chance))
    else:
        setattr(message, field.name, chance.choice(ODD[field.type]))


def change_text(text, chance):
    at, other = chance.randrange(len(text)), chance.choice("aZ09-_.=+/ ")
    return chance.choice([text[:at], text[at:], text[:at] + other + text[at + 1 :], text + text[at:], text.swapcase()])


def change_bytes(data, chance):
    at, piece = chance.randrange(len(data) + 1), chance.randbytes(chance.randrange(9))
    return chance.choice([
        data[:at],
        data[at:],
        data[:at] + piece + data[at:],
        data[:at] + piece + data[at + len(piece) :],
        data[:at] + bytes(byte ^ (1 << chance.randrange(8)) for byte in data[at : at + 1]) + data[at + 1 :],
        data + data[at:],
        data[:at] + b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01" + data[at:],
        data[:at] + piece * 500 + data[at:],
    ])  # fmt: skip


def mutated(all_samples, chance):
    """Return an RPC, a request that is valid but for a few changes of fields and bytes, and metadata."""
    method, request = chance.choice(all_samples)
    request = type(request).FromString(request.SerializeToString())
    for _ in range(chance.choice([0, 1, 1, 2, 3]) if request.DESCRIPTOR.fields else 0):
        change_field(request, chance)
    data = request.SerializeToString()
    for _ in range(chance.choice([0, 0, 0, 1, 2])):
        data = change_bytes(data, chance)
    text = "".join(chr(chance.randrange(32, 127)) for _ in range(chance.randrange(20)))
    odd = chance.choice([(), (), (("x-request-id", text),), (("x-odd-bin", chance.randbytes(20)),)])
    # Transports refuse longer messages, without a reason of ours.
    return method, data[:MAX_REQUEST_BYTES], odd


class Caller:
    """Calls with serialised requests, on one channel."""

    def __init__(self, channel):
        self._calls = {
            name: (channel.unary_stream if name in STREAMS else channel.unary_unary)(f"/{SERVICE.full_name}/{name}")
            for name in METHODS
        }

    async def code(self, method, data, metadata):
        """Call, and return the code; require that an error is a documented one."""
        call = self._calls[method](data, timeout=30, metadata=metadata)
        code, reason = grpc.StatusCode.OK, ""
        try:
            await (call.read() if method in STREAMS else call)
        except grpc.aio.AioRpcError as error:
            code, reason = error.code(), read_refusal(error).reason
        if method in STREAMS:
            call.cancel()
        assert code is grpc.StatusCode.OK or (code in DOCUMENTED and reason in REASONS), (code, method, data, metadata)
        return code

    async def codes(self, calls):
        return await asyncio.gather(*(self.code(*call) for call in calls))

    async def changed_since(self, token):
        """Return the ids of the jobs that have changed since then; require that they have only become stalled."""
        stream = self._calls["WatchJobs"](pb.WatchJobsRequest(resume_token=token).SerializeToString())
        events: list[pb.JobEvent] = []
        while not events or events[-1].type != pb.JOB_EVENT_TYPE_SYNCED:
            events += pb.WatchJobsResponse.FromString(await stream.read()).events
        stream.cancel()
        assert all(event.job.stalled for event in events[:-1]), events
        return {event.job.id for event in events[:-1]}

    async def state(self, job_id):
        """Return a position in the feed, and the job's history then, or why there is none."""
        listed = await self.ask("ListJobs", pb.ListJobsRequest(page_size=1), pb.ListJobsResponse)
        history = pb.ListJobTransitionsRequest(id=job_id, page_size=1000)
        try:
            return listed.resume_token, await self.ask("ListJobTransitions", history, pb.ListJobTransitionsResponse)
        except grpc.aio.AioRpcError as error:
            return listed.resume_token, error.code()

    async def prepare(self, job_id):
        """Create a job, and return valid requests about it with their RPCs."""
        retrying = pb.JobStatus(id=job_id, state=pb.JOB_STATE_RETRYING)
        await self.ask("UpdateJob", pb.UpdateJobRequest(job=job_of(job_id), allow_missing=True), pb.UpdateJobResponse)
        await self.ask("UpdateJob", pb.UpdateJobRequest(job=retrying), pb.UpdateJobResponse)
        listed = await self.ask("ListJobs", pb.ListJobsRequest(page_size=1), pb.ListJobsResponse)
        history = pb.ListJobTransitionsRequest(id=job_id, page_size=1)
        shown = await self.ask("ListJobTransitions", history, pb.ListJobTransitionsResponse)
        tokens = {
            "page": listed.next_page_token, "resume": listed.resume_token, "history": shown.next_page_token
        }  # fmt: skip
        return [(name, request) for name, requests in samples(job_id, tokens).items() for request in requests]

    async def ask(self, method, request, response_class):
        return response_class.FromString(await self._calls[method](request.SerializeToString()))


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("transport", ["grpcio", "native"])
def test_mutated_requests_get_documented_errors_and_change_nothing(tmp_path, is_full, record_fault, transport):
    if transport == "native":
        pytest.importorskip("pygrpc_native", reason="pygrpc-native is not built for this Python")
    count = INPUTS_IN_FULL if is_full else INPUTS
    log = tmp_path / "log"
    flags = ("--transport", transport, "--log-level", "warning")
    kinds: Counter[tuple[str, str]] = Counter()

    async def scenario(address):
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            for seed in range(count // AT_ONCE):
                chance = random.Random(f"{transport} {seed}")
                # No mutation of another id is this one.
                kinds.update(await fuzz(Caller(channel), f"job-{chance.getrandbits(64):x}", chance))

    async def fuzz(caller, job_id, chance):
        """Send mutated requests about one job; return how often each RPC has returned each code."""
        all_samples = await caller.prepare(job_id)
        calls = [mutated(all_samples, chance) for _ in range(AT_ONCE)]
        codes = await caller.codes(calls)
        refused = [call for call, code in zip(calls, codes, strict=True) if code is not grpc.StatusCode.OK]
        token, before = await caller.state(job_id)
        if grpc.StatusCode.OK not in await caller.codes(refused):
            changed = await caller.changed_since(token)
            assert job_id in changed or (await caller.state(job_id))[1] == before
        return Counter((method, code.name) for (method, *_), code in zip(calls, codes, strict=True))

    with ServerProcess(*flags, log=log, store=f"sqlite:///{tmp_path}/jobs.db") as server:
        asyncio.run(scenario(server.address))
        assert server.terminate() == 0
    assert b"Traceback" not in log.read_bytes()
    assert {method for method, _ in kinds} == set(METHODS)
    of_code: Counter[str] = Counter()
    for (_, code), number in kinds.items():
        of_code[code] += number
    record_fault(
        "mutated requests, tokens and metadata",
        count=kinds.total(),
        checked="codes, reasons, the store after refused calls",
        result="documented errors only, nothing changed: "
        + ", ".join(f"{number:,} {code}" for code, number in of_code.most_common()),
    )
