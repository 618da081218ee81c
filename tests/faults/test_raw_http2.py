"""HTTP/2 that no client library sends: other clients are served, the server's memory is bounded, nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import re
import struct
import time
import urllib.request
from pathlib import Path

import grpc
import psutil
import pytest
from jobstatus.v1 import job_status_pb2 as pb
from jobstatus.v1.job_status_pb2_grpc import JobStatusServiceStub

from jobstatus_grpc.server.addresses import private_folder
from tests.support.load import background_tasks
from tests.support.raw_http2 import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    OPENING,
    PING,
    PREFACE,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    WINDOW_UPDATE,
    RawConnection,
    call,
    call_fields,
    field,
    frame,
    message,
    resets,
    settings,
    streams,
)
from tests.support.servers import ServerProcess
from tests.support.service import update_of

pytestmark = pytest.mark.slow  # all together

MIB = 1024 * 1024
CONNECTIONS, FRAMES = 10, 200
WAVES, WAVES_IN_FULL = 1, 5
IDLE_CONNECTIONS = 2000
RESETS, RESET_WAVES = 80_000, 6
CLIENTS = 1000
MAX_GROWTH_BYTES = 150 * MIB
MAX_P99_SECONDS, MAX_NEW_CALL_SECONDS = 0.25, 1.0
MAX_P99_SECONDS_BESIDE_TESTS = 1.0
"""While other tests run at the same time, as in make check."""
"""Beyond what the client of the control waits for, and beyond what the server waits for a core."""
CHECKED = "another client's calls, less the waits of the server for a core; the memory of the server"
GET, WATCH = pb.GetJobRequest(id="a"), pb.WatchJobRequest(id="a")


def headers(stream, block, *, flags=END_HEADERS):
    return frame(HEADERS, block, flags=flags, stream=stream)


def each(make):
    """Frames made for one stream after another."""
    return map(make, streams())


def malformed(stream):
    """A frame that breaks a rule of the protocol, another one for each stream."""
    chance = random.Random(stream)
    payload = chance.randbytes(chance.choice([0, 1, 3, 7, 9, 100]))
    kind = chance.choice([PRIORITY, RST_STREAM, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, 10, 99, 255])
    return frame(kind, payload, flags=chance.randrange(256), stream=chance.choice([0, stream, stream + 1, 2**31 - 1]))


BLOCK = call_fields("GetJob")
FLOODS = {
    "SETTINGS": lambda: each(lambda stream: settings((INITIAL_WINDOW_SIZE, stream))),
    "PING": lambda: each(lambda stream: frame(PING, struct.pack(">Q", stream))),
    "RST_STREAM of streams that are not open": lambda: each(
        lambda stream: frame(RST_STREAM, struct.pack(">I", 8), stream=stream)
    ),
    "empty CONTINUATION": lambda: itertools.chain(
        [headers(1, BLOCK, flags=0)], itertools.repeat(frame(CONTINUATION, stream=1))
    ),
    "CONTINUATION without end": lambda: itertools.chain(
        [headers(1, BLOCK, flags=0)], itertools.repeat(frame(CONTINUATION, field("x", b"y" * 1000), stream=1))
    ),
    "HEADERS with a huge field": lambda: each(
        lambda stream: headers(stream, BLOCK + field("x", b"y" * 16_000), flags=END_HEADERS | END_STREAM)
    ),
    "HEADERS with many fields": lambda: each(
        lambda stream: headers(stream, BLOCK + 1500 * field("x", b"y"), flags=END_HEADERS | END_STREAM)
    ),
    "no window for responses": lambda: itertools.chain(
        [settings((INITIAL_WINDOW_SIZE, 0))],
        # 60 kB each.
        each(lambda stream: call(stream, "GetJob", pb.GetJobRequest(id="large"))),
    ),
    "windows that overflow": lambda: itertools.chain(
        [call(1, "WatchJob", WATCH)],
        itertools.repeat(frame(WINDOW_UPDATE, struct.pack(">I", 2**31 - 1), stream=1)),
    ),
    "DATA on unknown streams": lambda: each(lambda stream: frame(DATA, message(b"x" * 100), stream=stream)),
    "half a request": lambda: each(
        lambda stream: headers(stream, BLOCK) + frame(DATA, message(GET)[:-1], stream=stream)
    ),
    "calls that are never read": lambda: each(lambda stream: call(stream, "WatchJob", WATCH)),
    "malformed frames": lambda: each(malformed),
}

MAX_GROWTH_OF = {"HEADERS with many fields": 1000 * MIB, "no window for responses": 110 * MIB}
"""grpcio's core takes 200 kB for a call with 1,500 fields until it has refused it: 400 MiB in the first wave, up to 925
MiB from the second on, which begins while the calls of the first are freed, and no more in later ones. What responses
take is counted by --max-held-mib."""


def core_waits(pid):
    """For how many seconds each thread of a process has waited for a core, which the kernel gave to others."""
    waits = {}
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            waits[thread.name] = int((thread / "schedstat").read_text().split()[1]) / 1e9
    return waits


class Timing:
    """The seconds since its creation in which the process of a server has not only waited for a core."""

    def __init__(self, pid):
        self._pid = pid
        self._waits, self._began_at = core_waits(pid), time.monotonic()

    @property
    def seconds(self):
        waits = (waited - self._waits.get(thread, 0.0) for thread, waited in core_waits(self._pid).items())
        return time.monotonic() - self._began_at - max(waits)


class Other:
    """Another client, which reads a job all the time on one connection, and now and then on a new one."""

    def __init__(self, address, pid):
        self._address = address
        self._pid = pid
        self._seconds = []
        self._new_call_seconds = [0.0]
        self._reading = Timing(pid)
        self._connecting = None

    def clear(self):
        self._seconds.clear()
        self._new_call_seconds = [0.0]

    @property
    def longest_new_call_seconds(self):
        """That of a call on a new connection, the running one included."""
        return max(*self._new_call_seconds, self._connecting.seconds if self._connecting else 0.0)

    @property
    def p99(self):
        """That of the calls on the one connection, the running one included."""
        seconds = sorted([*self._seconds, self._reading.seconds])
        return seconds[len(seconds) * 99 // 100]

    async def update(self, *requests):
        async with self._connected() as stub:
            for request in requests:
                await stub.UpdateJob(request)

    async def read(self):
        async with self._connected() as stub:
            while True:
                self._reading = Timing(self._pid)
                await stub.GetJob(GET, timeout=30)
                self._seconds.append(self._reading.seconds)
                await asyncio.sleep(0.01)

    async def connect(self):
        while True:
            self._connecting = Timing(self._pid)
            async with self._connected() as stub:
                await stub.GetJob(GET, timeout=30)
            self._new_call_seconds.append(self._connecting.seconds)
            self._connecting = None
            await asyncio.sleep(0.1)

    @contextlib.asynccontextmanager
    async def _connected(self):
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(self._address, options=options) as channel:
            yield JobStatusServiceStub(channel)


class Attack:
    """A server that another client uses while raw connections send frames, and a server that nobody attacks.

    The second is the control: what its client waits for is the machine.
    """

    def __init__(self, server):
        process, other, self._metrics_url, control, self._max_p99_seconds = server
        self._address = process.address
        self._raw = []
        self._process = psutil.Process(process.pid)
        self._other, self._control = Other(other, process.pid), Other(control.address, control.pid)

    async def __aenter__(self):
        self._stack = contextlib.AsyncExitStack()
        start = await self._stack.enter_async_context(background_tasks())
        large = update_of("large", allow_missing=True, state=pb.JOB_STATE_SUCCEEDED)
        large.job.result["text"] = "x" * 60_000
        clients = (self._other, self._control)
        for client in clients:
            await client.update(large, update_of("a", allow_missing=True))
        self._reading = [start(use()) for client in clients for use in (client.read, client.connect)]
        await asyncio.sleep(1)
        for client in clients:
            client.clear()
        self.rss_before = self._process.memory_info().rss
        self.connections_before = self.connections
        return self

    async def __aexit__(self, *exception):
        await self.close_all()
        await self._stack.aclose()

    async def open(self, opening=OPENING):
        self._raw.append(await RawConnection.open(self._address, opening=opening))
        return self._raw[-1]

    async def close_all(self):
        while self._raw:
            await self._raw.pop().close()

    @property
    def connections(self):
        """Those that the server has not closed, also if it has yet to read what came before the client's end."""
        return sum(each.status in ("ESTABLISHED", "CLOSE_WAIT") for each in self._process.net_connections("tcp"))

    @property
    def growth(self):
        return self._process.memory_info().rss - self.rss_before

    def check(self, *, max_growth_bytes=MAX_GROWTH_BYTES, max_p99_seconds=None):
        """Require that the other client was served all the time."""
        for reading in self._reading:
            assert not reading.done(), reading.exception()
        max_p99_seconds = max_p99_seconds or self._max_p99_seconds
        assert self._other.p99 <= max_p99_seconds + self._control.p99, self
        longest_seconds = MAX_NEW_CALL_SECONDS + self._control.longest_new_call_seconds
        assert self._other.longest_new_call_seconds < longest_seconds, self
        assert self.growth < max_growth_bytes

    async def finish(self):
        """Require that no other client was harmed, and that the end of the connections leaves nothing."""
        print(self)
        self.check()
        await self.close_all()
        await self.ends_without_leftovers()

    async def ends_without_leftovers(self):
        """Require that connections, watches and the memory of open calls end soon on the server too."""
        for _ in range(200):
            left = {name: value for name, value in (await asyncio.to_thread(self._gauges)).items() if value}
            if self.connections <= self.connections_before + 1 and not left:
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"{self.connections} connections, {self.connections_before} before; {left}")

    async def is_worked_off(self):
        """Wait until the server has answered what it got: its process uses less than half of a core again."""
        used_seconds, seconds = 1.0, 0.1
        while used_seconds > seconds / 2:
            before = sum(self._process.cpu_times()[:2])
            await asyncio.sleep(seconds)
            used_seconds = sum(self._process.cpu_times()[:2]) - before

    async def until_watched(self, count):
        """Wait until this number of watches of one job is open."""
        while (await asyncio.to_thread(self._gauges))['jobstatus_watchers{kind="job"}'] != count:  # noqa: ASYNC110
            await asyncio.sleep(0.05)

    def _gauges(self):
        with urllib.request.urlopen(self._metrics_url, timeout=20) as response:
            lines = response.read().decode().splitlines()
        return {
            name: float(value)
            for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
            if name.startswith("jobstatus_watchers") or name == "jobstatus_held_bytes"
        }

    def __str__(self):
        return (
            f"p99 {self._other.p99 * 1000:.0f} ms (control {self._control.p99 * 1000:.0f}), "
            f"new call <= {self._other.longest_new_call_seconds:.2f} s "
            f"(control {self._control.longest_new_call_seconds:.2f}), memory +{self.growth / MIB:.0f} MiB"
        )


@pytest.fixture
def server(transport, tmp_path, is_full):
    # Without --auth a caller is a host, and all clients of Unix sockets are another one.
    with private_folder() as folder:
        other = f"unix:{folder}/other"
        flags = ("--listen", other, "--max-held-mib", "64", "--metrics", "127.0.0.1:0", "--log-format", "text")
        log = tmp_path / "log"
        with (
            ServerProcess("--transport", transport, listen=f"unix:{folder}/control") as control,
            ServerProcess("--transport", transport, *flags, log=log) as process,
        ):
            while not (found := re.search(r"metrics on (\S+)", log.read_text())):
                time.sleep(0.01)
            max_p99_seconds = MAX_P99_SECONDS if is_full else MAX_P99_SECONDS_BESIDE_TESTS
            yield process, other, found[1], control, max_p99_seconds
            assert process.terminate() == 0


def run(scenario):
    return asyncio.run(asyncio.wait_for(scenario, 250))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("flood", FLOODS)
def test_a_flood_of_frames_harms_no_other_client(server, is_full, record_fault, flood):
    sent = 0
    max_growth_bytes = MAX_GROWTH_OF.get(flood, MAX_GROWTH_BYTES)

    async def scenario():
        nonlocal sent
        async with Attack(server) as attack:
            for _ in range(WAVES_IN_FULL if is_full else WAVES):
                connections = [await attack.open() for _ in range(CONNECTIONS)]
                floods = (raw.send_each(itertools.islice(FLOODS[flood](), FRAMES), at_once=50) for raw in connections)
                sent += sum(await asyncio.gather(*floods))
                await asyncio.sleep(0.5)
                print(flood, sent, attack)
                attack.check(max_growth_bytes=max_growth_bytes)
                await attack.close_all()
                await attack.ends_without_leftovers()
                attack.check(max_growth_bytes=max_growth_bytes)
            return str(attack)

    result = run(scenario())
    record_fault(f"a flood of raw frames: {flood}", count=sent, checked=CHECKED, result=result)


@pytest.mark.timeout(300)
def test_80000_calls_that_are_reset_at_once_neither_stop_others_nor_cost_memory(server, record_fault):
    # Made before, so that this process has time for the other client.
    frames = list(resets(RESETS, "GetJob", GET))

    async def scenario():
        async with Attack(server) as attack:
            # gRPC's core grows by up to 50 MiB a wave, in the first few.
            for _ in range(RESET_WAVES):
                raw = await attack.open()
                await raw.send_each(frames)
                await attack.is_worked_off()
                await attack.close_all()
            print(attack)
            attack.check(max_p99_seconds=MAX_NEW_CALL_SECONDS)
            return str(attack)

    result = run(scenario())
    record_fault("80,000 calls reset at once", count=RESET_WAVES, checked=CHECKED, result=result)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("opening", [b"", OPENING], ids=["silent", "after the preface"])
def test_2000_idle_connections_harm_no_other_client(server, record_fault, opening):
    async def scenario():
        async with Attack(server) as attack:
            for _ in range(IDLE_CONNECTIONS):
                await attack.open(opening)
            await asyncio.sleep(0.5)
            await attack.finish()
            return str(attack)

    result = run(scenario())
    what = "after their preface" if opening else "that send nothing"
    record_fault(f"idle connections {what}", count=IDLE_CONNECTIONS, checked=CHECKED, result=result)


@pytest.mark.timeout(300)
def test_1000_clients_that_come_back_at_once_all_get_their_watch(server, record_fault):
    async def scenario():
        async with Attack(server) as attack:
            watch = OPENING + call(1, "WatchJob", WATCH)
            await asyncio.gather(*(attack.open(watch) for _ in range(CLIENTS)))
            await attack.until_watched(CLIENTS)
            await attack.finish()
            return str(attack)

    result = run(scenario())
    record_fault("clients that open a watch at once", count=CLIENTS, checked=f"their watches, {CHECKED}", result=result)


@pytest.mark.timeout(300)
def test_bytes_that_come_slowly_harm_no_other_client(server, is_full, record_fault):
    pause_seconds, seconds = (1, 60) if is_full else (0.1, 3)
    data = OPENING + call(1, "GetJob", GET)

    async def trickle(attack):
        raw = await attack.open(b"")
        for byte in data[: int(seconds / pause_seconds)]:
            await raw.send(bytes([byte]))
            await asyncio.sleep(pause_seconds)

    async def scenario():
        async with Attack(server) as attack:
            await asyncio.gather(*(trickle(attack) for _ in range(200)))
            await attack.finish()
            return str(attack)

    result = run(scenario())
    record_fault("connections that send a byte a second", count=200, checked=CHECKED, result=result)


@pytest.mark.parametrize("preface", [PREFACE[:-1] + b"X", b"GET / HTTP/1.1\r\n\r\n", PREFACE.lower(), b"\x00" * 64])
def test_a_connection_with_a_wrong_preface_is_closed(server, preface):
    async def scenario():
        raw = await RawConnection.open(server[0].address, opening=preface + settings())
        while not raw.is_closed:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.01)
        await raw.close()

    asyncio.run(asyncio.wait_for(scenario(), 20))
