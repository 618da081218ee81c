"""A disk that answers EIO under a SQLite server: nothing is acknowledged that is not stored, and reads go on."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import grpc
import pytest

from tests.support.disk import failing_environment, until_writable
from tests.support.judged import judged_under_faults
from tests.support.servers import ServerProcess
from tests.support.service import Service

FAULTS, FAULTS_IN_FULL = 6, 120

FAILURES = ("fsync -wal", "fsync .db", "pwrite -wal", "pwrite .db", "pread -wal", "pread .db")


@pytest.fixture
def failures(tmp_path, monkeypatch):
    """A file whose lines name the calls that fail in processes which are started from now on."""
    environment, order = failing_environment(tmp_path)
    for name in ("LD_PRELOAD", "DISK_FAILURES"):
        monkeypatch.setenv(name, environment[name])
    return order


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [1])
def test_no_acknowledged_write_is_lost_to_errors_of_the_disk(tmp_path, failures, is_full, record_fault, seed):
    chance = random.Random(seed)
    times = FAULTS_IN_FULL if is_full else FAULTS
    caused: Counter[str] = Counter()
    with ServerProcess(store=f"sqlite:///{tmp_path}/jobs.db", log=tmp_path / "log") as server:

        def fail() -> None:
            call = FAILURES[caused.total() % len(FAILURES)]
            caused[call] += 1
            failures.write_text(f"{call}\n")
            time.sleep(chance.uniform(0.05, 1.2))
            failures.write_text("")
            service = Service(server.address)
            try:
                until_writable(service.channel)
            except grpc.RpcError:  # a failed sync has ended the process
                assert server.wait() == 1
                server.restart()
            finally:
                service.close()

        async def fault() -> None:
            await asyncio.to_thread(fail)

        judging = judged_under_faults(
            [server.address], fault, times=times, pause=lambda: chance.uniform(0.1, 0.5), seed=seed
        )
        judged = asyncio.run(judging)
    record_fault(
        "EIO from fsync, pwrite and pread of the SQLite database and its log",
        count=caused.total(),
        checked=f"{judged.acknowledged:,} acknowledged writes, {judged.calls:,} calls",
        result="none lost, no violation",
    )


def test_writes_are_refused_while_they_fail_and_reads_go_on(tmp_path, failures):
    with ServerProcess(store=f"sqlite:///{tmp_path}/jobs.db", log=tmp_path / "log") as server:
        service = Service(server.address)
        job = service.create(id="a")
        failures.write_text("pwrite -wal\n")
        with pytest.raises(grpc.RpcError):
            service.create(id="b")
        until_writable(service.channel, is_writable=False)
        assert service.get("a") == job
        failures.write_text("")
        until_writable(service.channel)
        service.create(id="c")
        with pytest.raises(grpc.RpcError) as unknown:
            service.get("b")
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
        service.close()


def read(service: Service, numbers: Iterable[int]) -> list[Any]:
    return [service.get(f"{number}") for number in numbers]


@pytest.mark.slow
def test_a_part_of_the_disk_that_cannot_be_read_does_not_end_the_server(tmp_path, failures):
    with ServerProcess(store=f"sqlite:///{tmp_path}/jobs.db", log=tmp_path / "log") as server:
        service = Service(server.address)
        jobs = [service.create(id=f"{number}", reason="r" * 4000) for number in range(1000)]
        service.close()
        assert server.terminate() == 0
        server.start()
        service = Service(server.address)
        failures.write_text("pread .db\n")
        with pytest.raises(grpc.RpcError) as unreadable:
            read(service, range(1000))
        assert unreadable.value.code() is grpc.StatusCode.DATA_LOSS
        until_writable(service.channel, is_writable=False)
        failures.write_text("")
        until_writable(service.channel)
        assert read(service, range(1000)) == jobs
        service.create(id="after")
        service.close()
        assert server.terminate() == 0
